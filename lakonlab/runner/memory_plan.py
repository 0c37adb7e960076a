"""What a run needs on each device, by strategy and number of processes; pure arithmetic on sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lakonlab.parallel.units import number_of_parts

GIBIBYTE = 2**30
STRATEGIES = ('single', 'ddp', 'fsdp', 'fsdp2')
SHARDING = ('fsdp', 'fsdp2')
CARDS = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
"""Memory of accelerators in GiB."""
OVERHEAD = 2 * GIBIBYTE
"""What the driver's context, libraries and their workspaces take."""
PROCESSES_PER_NODE = 8


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch takes, gradients of parameters left out.

    Attributes:
        held: Alive between the student's forward and backward pass.
        peak: Most that is alive while the student goes forward and backward.
        asking: Alive while the teacher is asked: what is held, and the teacher's own.
    """

    held: int
    peak: int
    asking: int = 0

    @property
    def most(self) -> int:
        """The larger of the two."""
        return max(self.peak, self.asking)


@dataclass(frozen=True)
class Sharding:
    """Bytes of what one sharding strategy does with a model.

    Attributes:
        optimizer: State of the optimisers.
        gathered: Weights that are gathered at once while the student computes: some units, and what is in no unit.
        teacher_gathered: The same of the teacher, if it is divided.
        unit_gradients: Whole gradients of the unit that has most.
        keeps_gradients: Whether gradients stay whole between the passes of a step, to be exchanged once.
    """

    optimizer: int
    gathered: int = 0
    teacher_gathered: int = 0
    unit_gradients: int = 0
    keeps_gradients: bool = True


@dataclass(frozen=True)
class Sizes:
    """Bytes on one device that holds everything; activations are those of one micro-batch.

    Attributes:
        frozen: Weights that never change and that sharding strategies share out: the base of a student, and a teacher's
            where ``wrap_frozen_modules`` says so.
        resident: Weights that every process holds whole: autoencoder, text encoder, a teacher that is not wrapped,
            buffers, and what ``exclude_keys`` and ``ignore_frozen_parameters`` name.
        trainable: Weights that are trained.
        average: Moving averages.
        gradients: Gradients.
        optimizer: State of the optimisers.
        kept: Activations without gradient checkpointing; None if they are not known.
        checkpointed: Activations with it; None if they are not known.
        sharding: Name of a sharding strategy -> what it does.
        passes: Forward and backward passes of a step.
        undivided: Of what is trained or averaged, with gradients and state, what every process holds whole.
        undivided_gradients: Of the gradients, what every process holds whole.
        saved: What a checkpoint holds of weights, averages and buffers, without the optimisers' state.
        saved_undivided: Of that and the optimisers' state, what every process holds whole.
    """

    frozen: int
    resident: int
    trainable: int
    average: int
    gradients: int
    optimizer: int
    kept: Activations | None
    checkpointed: Activations | None
    sharding: Mapping[str, Sharding] = field(default_factory=dict)
    passes: int = 1
    undivided: int = 0
    undivided_gradients: int = 0
    saved: int = 0
    saved_undivided: int = 0

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
        parts: Among how many processes a copy of the weights is divided.
        states: Weights, gradients, optimiser and averages after a step.
        gathered: Weights that are gathered for the moment.
        gradients_between: Gradients that are there when a pass begins that is not the first of its step.
        kept: The most at any moment of a step, with activations kept; None if those are not known.
        checkpointed: The same with gradient checkpointing; None if activations are not known.
        host: Memory of the machine that an asynchronous checkpoint takes: a copy of what this process holds of the
            state.
    """

    strategy: str
    world_size: int
    parts: int
    states: int
    gathered: int
    gradients_between: int
    kept: int | None
    checkpointed: int | None
    host: int


def plan(
    sizes: Sizes,
    strategy: str,
    world_size: int,
    hybrid_sharding: bool = True,
    shard_size: int | None = None,
    processes_per_node: int = PROCESSES_PER_NODE,
) -> Plan:
    """What one process holds.

    ``ddp`` holds everything, and its buckets of gradients all the time. The sharding strategies hold a part of all but
    what is whole. They gather units of weights, and hold the whole gradients of a unit until they are reduced, or of
    all units if a step has several passes and exchanges gradients in the last one only.

    Args:
        sizes: Sizes on one device.
        strategy: One of :data:`STRATEGIES`.
        world_size: Number of processes.
        hybrid_sharding: Whether every node holds a whole copy, so that parts are as many as processes of a node.
        shard_size: Number of processes that share one copy; None for those of a node, or all.
        processes_per_node: Processes of a full node.

    Raises:
        ValueError: The strategy is unknown, or ``world_size`` is not positive.
        ConfigError: ``shard_size`` does not divide ``world_size``.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f'strategy={strategy!r}: expected one of {", ".join(STRATEGIES)}')
    if world_size < 1:
        raise ValueError(f'world_size={world_size}: expected at least 1')
    several = sizes.passes > 1
    if strategy not in SHARDING:
        between = sizes.gradients if strategy == 'ddp' or several else 0
        base = sizes.states - sizes.gradients
        totals = (
            None if size is None else base + max(between + size.most, sizes.gradients + size.peak - size.held)
            for size in (sizes.kept, sizes.checkpointed)
        )
        host = sizes.saved + sizes.optimizer
        return Plan(strategy, world_size, 1, sizes.states, 0, between, *totals, host)

    local = min(world_size, processes_per_node)
    parts = number_of_parts(world_size, local, hybrid_sharding, shard_size)
    sharding = sizes.sharding.get(strategy, Sharding(sizes.optimizer))

    def share(size: int, undivided: int) -> int:
        return undivided + -(-(size - undivided) // parts)

    states = share(
        sizes.states - sizes.optimizer + sharding.optimizer,
        sizes.resident + sizes.undivided,
    )
    gradients = share(sizes.gradients, sizes.undivided_gradients)
    between = 0
    if several:
        between = sizes.gradients if sharding.keeps_gradients else gradients
    is_divided = parts > 1 or strategy != 'fsdp'  # FSDP1 gathers nothing where there is nothing to gather
    gathered, asked, unit = (
        size if is_divided else 0 for size in (sharding.gathered, sharding.teacher_gathered, sharding.unit_gradients)
    )
    totals = (
        None
        if size is None
        else states
        - gradients
        + max(
            between + gathered + unit + size.peak,
            between + asked + size.asking,
            gradients + gathered + 2 * unit + size.peak - size.held,
        )
        for size in (sizes.kept, sizes.checkpointed)
    )
    host = share(sizes.saved + sharding.optimizer, sizes.saved_undivided)
    return Plan(strategy, world_size, parts, states, gathered, between, *totals, host)


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

    titles = ('processes', 'parts', 'states', 'gathered', 'most', 'most, checkpointing', 'host')
    lines = [f'  {"in " + name:<8}' + ''.join(f'{title:>{len(title) + 3}}' for title in titles)]
    for entry in plans:
        sizes = (entry.states, entry.gathered, entry.kept, entry.checkpointed, entry.host)
        cells = (str(entry.world_size), str(entry.parts), *map(number, sizes))
        lines.append(
            f'  {entry.strategy:<8}' + ''.join(f'{cell:>{len(title) + 3}}' for cell, title in zip(cells, titles))
        )
    return lines


def remarks(plans: Sequence[Plan], passes: int) -> list[str]:
    """Sentences about what the table does not say.

    Args:
        plans: What was planned.
        passes: Forward and backward passes of a step.
    """
    sentences = []
    whole = [entry for entry in plans if entry.strategy in SHARDING and entry.parts > 1 and entry.gradients_between]
    if whole:
        most = max(entry.gradients_between for entry in whole)
        names = _listed(sorted({entry.strategy for entry in whole}))
        sentences.append(
            f'{names} hold {most / GIBIBYTE:,.2f} GB of gradients between the {passes} passes of a step; unless '
            'fsdp_kwargs.sync_every_pass=True they are whole and exchanged once.'
        )
    sentences.append(
        'host: memory of the machine, for each of its processes, that a checkpoint being written takes; none with '
        'checkpoint_config.asynchronous=False.'
    )
    return sentences


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
