"""The copy of a run's logs, ``work_dir_mirror``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from lakonlab.mmengine_parts import Hook
from lakonlab.ranks import ALONE, Ranks
from lakonlab.storage.background import BackgroundWriter
from lakonlab.storage.mirror import Mirror

logger = logging.getLogger(__name__)


class MirrorHook(Hook):
    """Copies what was written to ``work_dir`` at every log line and after every save, beside training.

    A failure is reported as an error, and the files are tried again the next time; one at the end of the run fails it.

    Args:
        mirror: The copy.
        interval: Iterations between log lines.
    """

    priority = 'LOWEST'

    def __init__(self, mirror: Mirror, interval: int):
        self.mirror, self.interval = mirror, interval
        self._background = BackgroundWriter()
        self._saved: int | None = None

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Begin to copy if it is time to, and nothing is being copied."""
        step = runner.iter + 1
        saved = runner.checkpoint_hook and runner.checkpoint_hook.last_saved
        if (step % self.interval == 0 or saved != self._saved) and self._background.is_idle:
            self._saved = saved
            self._background.submit(self._update)

    def _update(self) -> None:
        try:
            self.mirror.update()
        except OSError as error:
            logger.error('%s is not up to date (%s); the next try is at the next log line', self.mirror.remote, error)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Keep the copy up to date while open, and complete it at the end.

        Raises:
            OSError: It cannot be completed, and nothing else went wrong that would be more important.
        """
        with mirroring(self.mirror):
            try:
                yield
            finally:
                self._background.close()


@contextlib.contextmanager
def mirroring(mirror: Mirror | None, ranks: Ranks = ALONE) -> Iterator[None]:
    """Begin a copy where the one before ended, and complete it at the end.

    Args:
        mirror: The copy; None for none, and in every process but the main one.
        ranks: The processes that enter this together.

    Raises:
        OSError: It cannot be begun or completed, in every process; where something else has failed already, that is
            only logged.
    """
    ranks.on_main(lambda: None if mirror is None else mirror.fetch())
    try:
        yield
    except BaseException:
        if mirror is not None:
            try:
                mirror.update()
            except OSError as error:
                logger.error('%s is not complete: %s', mirror.remote, error)
        raise
    ranks.on_main(lambda: None if mirror is None else mirror.update())
