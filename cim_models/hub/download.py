"""A file that the manifest describes → a verified copy in the cache, from the first source that has it whole."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from cim_models.errors import WeightsError
from cim_models.hub.access import Access
from cim_models.hub.cache import Cache, Damaged
from cim_models.hub.entry import WeightFile
from cim_models.hub.integrity import check_file, side_by_side
from cim_models.hub.remote import AWAY, Source, hub_file
from cim_models.hub.waiting import IDLE, TOTAL, Patience, Unreachable

logger = logging.getLogger(__name__)


class Downloads:
    """The files of one release, from one list of sources; a source that is away is asked once.

    Args:
        sources: `hf-hub:org/name@commit` or addresses of folders, in the order in which they are asked.
        access: How.
    """

    def __init__(self, sources: Iterable[str], access: Access):
        self.access = access
        self.cache = Cache(access)
        self.sources = [Source(name, access) for name in sources]
        self.asked: set[Source] = set()
        self.away: dict[Source, str] = {}
        self.patience = Patience(min(IDLE, TOTAL / max(len(self.sources), 1)))

    def obtain(self, files: Sequence[WeightFile]) -> dict[WeightFile, Path]:
        """Verified copies: those that were downloaded before, by us or by the Hub's own client, or new ones.

        Raises:
            WeightsError: With what every source said.
        """
        here = dict(zip(files, side_by_side(self._kept, files), strict=True))
        return {file: path or self._download(file) for file, path in here.items()}

    def _kept(self, file: WeightFile) -> Path | None:
        return self.cache.find(file) or self._of_the_hub_client(file)

    def _download(self, file: WeightFile) -> Path:
        if self.access.offline:
            raise self.cache.lacks(Path(file.path).name)
        complaints = []
        for source in self.sources:
            try:
                return self._from(source, file)
            except Unreachable as error:
                self.away[source] = str(error)
                complaints.append(f"{error} ({AWAY})")
            except WeightsError as error:
                complaints.append(str(error))
        raise WeightsError("; ".join(complaints) or "it is nowhere on the network")

    def _from(self, source: Source, file: WeightFile) -> Path:
        """A new copy from one source; one that arrives damaged is asked for once again."""
        if source in self.away:
            raise Unreachable(self.away[source])
        name = Path(file.path).name
        self.patience.renew()
        if source not in self.asked:  # whoever is away is found out before others have to wait for the lock
            source.preflight(name, self.patience)
            self.asked.add(source)
        try:
            return self._add(source, file)
        except Damaged as error:
            logger.warning("%s of %s: %s; it is downloaded once again", name, source.name, error)
        try:
            return self._add(source, file)
        except Damaged as error:
            raise WeightsError(f"{name} of {source.name}: {error}: twice, so it is the source that is wrong") from error

    def _add(self, source: Source, file: WeightFile) -> Path:
        self.patience.size = 0
        with self.cache.adding(file, self.patience) as (partial, path):
            added = self.cache.find(file)
            if added is not None:
                partial.unlink(missing_ok=True)
                return added
            source.receive(file, partial, self.patience)
        return path

    def _of_the_hub_client(self, file: WeightFile) -> Path | None:
        for source in self.sources:
            path = hub_file(source, Path(file.path).name)
            if path is not None:
                try:
                    check_file(path, file)
                    return path
                except WeightsError as error:
                    logger.warning("%s; it is not used", error)
        return None
