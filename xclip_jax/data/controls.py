"""Sources of control experiments: a share of the pairs, and captions that are exchanged among them."""

import collections
from collections.abc import Mapping, Sequence

import numpy as np

from xclip_jax.core.errors import BadSample, UserError
from xclip_jax.data.base import Record, Source, WrappedSource
from xclip_jax.data.config import DataConfig

# Streams of random numbers: which pairs are kept, and which captions are exchanged.
_SUBSET, _NOISE = 1, 2


class Subset(WrappedSource):
    """The records `indices` of a source, in this order. Its fingerprint is that of the whole source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        super().__init__(source)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def describe(self, index: int) -> dict[str, str]:
        """Return what names a record to a person, as the source does."""
        return self.source.describe(int(self.indices[index]))

    def known_fault(self, index: int) -> str:
        """Return why a record cannot be used, as far as the source knows."""
        return self.source.known_fault(int(self.indices[index]))

    def known_faults(self) -> Mapping[str, int]:
        """Return the number of its own records by fault."""
        return collections.Counter(filter(None, map(self.known_fault, range(len(self)))))


class NoisyCaptions(WrappedSource):
    """A source of pairs some of which have the captions and keywords of another one: record i those of `donors[i]`.

    A bad record makes the one that has its captions bad too.
    """

    def __init__(self, source: Source, donors: np.ndarray) -> None:
        super().__init__(source)
        self.donors = donors

    def __getitem__(self, index: int) -> Record:
        record, donor = self.source[index], int(self.donors[index])
        if donor == index:
            return record
        try:
            other = self.source[donor]
        except BadSample as error:
            place = ", ".join(f"{key} {value}" for key, value in self.source.describe(donor).items())
            raise BadSample("the pair whose captions it has is bad", f"{place}: {error}") from error
        return record | {"text": other["text"], "tags": other["tags"]}


def kept_indices(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Indices of `share` of `n` records, sorted; with one generator's seed a smaller share is a part of a larger."""
    return np.sort(rng.permutation(n)[: max(round(share * n), 1)])


def caption_donors(n: int, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return for each of `n` records whose captions it has, int (n,): for `share` of them another one's.

    The records of a smaller share are among those of a larger. They give their captions on in one cycle, so that every
    caption is still used once and none of them keeps its own.
    """
    donors = np.arange(n)
    noisy = rng.permutation(n)[: round(share * n)]
    donors[noisy] = np.roll(noisy, 1)
    return donors


def apply(opened: Sequence[Source], config: DataConfig, seed: int, *, labelled: bool = False) -> list[Source]:
    """Return the sources of a run as `data.subset` and `data.caption_noise` change them, each source by itself.

    Args:
      opened: the whole sources.
      config: of the run.
      seed: of the run; it decides which pairs are kept and which exchange their captions, for the whole of it.
      labelled: whether the sources are of labelled items and not of pairs.

    Raises:
      UserError: fewer pairs than a batch, fewer than two that exchange captions, or noise in labelled items.
    """
    result = list(opened)
    if config.subset < 1:
        for number, source in enumerate(result):
            rng = np.random.default_rng((seed, number, _SUBSET))
            result[number] = Subset(source, kept_indices(len(source), config.subset, rng))
        if (pairs := sum(map(len, result))) < config.batch and not labelled:
            raise UserError(
                f"data.subset={config.subset} leaves {pairs} pairs, fewer than data.batch={config.batch}; enlarge the "
                "subset, or lower data.batch."
            )
    if config.caption_noise:
        if labelled:
            raise UserError("data.caption_noise exchanges captions, and labelled items have none; set it to 0.")
        for number, source in enumerate(result):
            if round(config.caption_noise * len(source)) < 2:
                raise UserError(
                    f"data.caption_noise={config.caption_noise} is less than two of the {len(source)} pairs of "
                    f"{config.sources[number]!r}; raise it, or set it to 0."
                )
            rng = np.random.default_rng((seed, number, _NOISE))
            result[number] = NoisyCaptions(source, caption_donors(len(source), config.caption_noise, rng))
    return result
