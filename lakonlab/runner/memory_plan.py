"""What a run needs on each device, by strategy and number of processes; pure arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

GIBIBYTE = 2**30
STRATEGIES = ('ddp', 'fsdp', 'fsdp2')
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
"""Memory of accelerators in GiB."""
OVERHEAD = 2 * GIBIBYTE
"""What the driver's context, libraries and their workspaces take."""
PROCESSES_PER_NODE = 8


@dataclass(frozen=True)
class Sizes:
    """Bytes on one device that holds everything; activations are those of one micro-batch.

    Attributes:
        frozen: Weights that never change and that sharding strategies share out: the base of a student, and a teacher's
            where ``wrap_frozen_modules`` says so.
        resident: Weights that every process holds whole: autoencoder, text encoder, a teacher that is not wrapped.
        trainable: Weights that are trained.
        average: Moving averages.
        gradients: Gradients.
        optimizer: State of the optimisers.
        kept: Activations without gradient checkpointing; None if they are not known.
        checkpointed: Activations with it; None if they are not known.
        gathered: The two largest units of weights, which a sharding strategy gathers at once.
        sharded_optimizer: State of the optimisers under strategies that share it out, where that differs.
        undivided: Of what is trained or averaged, with gradients and state, what every process holds whole.
    """

    frozen: int
    resident: int
    trainable: int
    average: int
    gradients: int
    optimizer: int
    kept: int | None
    checkpointed: int | None
    gathered: int = 0
    sharded_optimizer: int | None = None
    undivided: int = 0

    @property
    def states(self) -> int:
        """Everything but activations."""
        return self.frozen + self.resident + self.trainable + self.average + self.gradients + self.optimizer


@dataclass(frozen=True)
class Plan:
    """Bytes of one process.

    Attributes:
        strategy: Name of the strategy.
        world_size: Number of processes.
        states: Weights, gradients, optimiser and averages.
        gathered: Weights that are gathered for the moment.
        kept: Sum with activations kept; None if those are not known.
        checkpointed: Sum with gradient checkpointing; None if activations are not known.
    """

    strategy: str
    world_size: int
    states: int
    gathered: int
    kept: int | None
    checkpointed: int | None


def plan(sizes: Sizes, strategy: str, world_size: int, hybrid_sharding: bool = True) -> Plan:
    """What one process holds.

    ``ddp`` holds everything. The sharding strategies hold a part of all but ``resident``, and gather two units of
    weights at a time, the one that computes and the one that is fetched ahead.

    Args:
        sizes: Sizes on one device.
        strategy: One of :data:`STRATEGIES`.
        world_size: Number of processes.
        hybrid_sharding: Whether every node holds a whole copy, so that parts are as many as processes of a node.

    Raises:
        ValueError: The strategy is unknown or ``world_size`` is not positive.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f'strategy={strategy!r}: expected one of {", ".join(STRATEGIES)}')
    if world_size < 1:
        raise ValueError(f'world_size={world_size}: expected at least 1')
    gathered, states = 0, sizes.states
    if strategy != 'ddp' and world_size > 1:
        parts = min(world_size, PROCESSES_PER_NODE) if hybrid_sharding else world_size
        whole = sizes.resident + sizes.undivided
        shared = sizes.states - whole
        if sizes.sharded_optimizer is not None:
            shared += sizes.sharded_optimizer - sizes.optimizer
        states = whole + -(-shared // parts)
        gathered = sizes.gathered
    totals = (None if size is None else states + gathered + size for size in (sizes.kept, sizes.checkpointed))
    return Plan(strategy, world_size, states, gathered, *totals)


def smallest_card(size: int, cards: Sequence[int] = CARDS) -> int | None:
    """The smallest memory in GiB that holds so many bytes and the overhead; None if none does."""
    return next((card for card in cards if size + OVERHEAD <= card * GIBIBYTE), None)


def recommendation(plans: Iterable[Plan], checkpointing: bool) -> list[str]:
    """Sentences that say which strategy fits which card.

    Args:
        plans: What was planned.
        checkpointing: Whether the run checkpoints gradients.
    """
    by_size: dict[int, list[Plan]] = {}
    for entry in plans:
        by_size.setdefault(entry.world_size, []).append(entry)
    sentences = []
    for world_size, entries in by_size.items():
        fitting = []
        for entry in entries if world_size > 1 else entries[:1]:
            total = entry.checkpointed if checkpointing else entry.kept
            size = entry.states + entry.gathered if total is None else total
            card = smallest_card(size)
            need = f'a card of {card} GB' if card is not None else f'more than {CARDS[-1]} GB'
            name = entry.strategy if world_size > 1 else 'one process'
            fitting.append((need, name))
        grouped: dict[str, list[str]] = {}
        for need, name in fitting:
            grouped.setdefault(need, []).append(name)
        parts = [f'{_listed(names)} {"needs" if len(names) == 1 else "need"} {need}' for need, names in grouped.items()]
        where = f'on {world_size} processes ' if world_size > 1 else ''
        sentence = where + ', '.join(parts)
        sentences.append(sentence[0].upper() + sentence[1:] + '.')
    return sentences


def _listed(names: Sequence[str]) -> str:
    return ', '.join(names[:-1]) + ' and ' + names[-1] if len(names) > 1 else names[0]


def table(plans: Sequence[Plan]) -> list[str]:
    """The plans as lines of text, in GB of 2 ** 30 bytes, or MB where all is small."""
    largest = max(max(entry.states, entry.kept or 0) for entry in plans)
    unit, name = (GIBIBYTE, 'GB') if largest >= GIBIBYTE else (2**20, 'MB')

    def number(size: int | None) -> str:
        return 'unknown' if size is None else f'{size / unit:,.1f}'

    lines = [f'  {"in " + name:<8}{"processes":>10}{"states":>10}{"gathered":>10}{"sum":>10}{"sum, checkpointing":>20}']
    for entry in plans:
        lines.append(
            f'  {entry.strategy:<8}{entry.world_size:>10}{number(entry.states):>10}{number(entry.gathered):>10}'
            f'{number(entry.kept):>10}{number(entry.checkpointed):>20}'
        )
    return lines


def parse_world_sizes(text: str) -> list[int]:
    """Numbers of processes on a command line, such as ``'8,32'``.

    Raises:
        ValueError: It holds anything but positive whole numbers.
    """
    sizes = []
    for part in text.split(','):
        if not part.strip().isdigit() or int(part) < 1:
            raise ValueError(f'--plan-world-size {text!r}: expected positive whole numbers such as 8,32')
        sizes.append(int(part))
    return sizes


def optimizer_bytes(options: Mapping[str, object], sizes: Sequence[tuple[int, int]]) -> int:
    """Bytes of an optimiser's state.

    Args:
        options: Its section of the config.
        sizes: Elements and bytes of every trained parameter.
    """
    name = str(options['type'])
    moments = number_of_moments(options)
    if name.endswith('8bit'):
        return sum(moments * elements for elements, _ in sizes)
    return sum(moments * size for _, size in sizes)


def number_of_moments(options: Mapping[str, object]) -> int:
    """How many numbers an optimiser keeps for every parameter; two unless it is known to keep fewer."""
    name = str(options['type']).removesuffix('8bit').removesuffix('32bit').removeprefix('Paged')
    if name == 'Adafactor':
        return 0  # a row and a column for every matrix
    if name == 'AdEMAMix':
        return 3
    if name == 'SGD':
        return int(bool(options.get('momentum', 0)))
    if name in ('Adagrad', 'Lion', 'Muon', 'RMSprop'):
        return 1 + int(name == 'RMSprop' and bool(options.get('momentum', 0)))
    return 2 + int(bool(options.get('amsgrad', False)))
