"""The claims of study.md as comparisons of arms."""

from collections.abc import Iterator

from studies.declaration import Claim, ClaimPart

BOTH_WAYS = ("image_to_text/r1", "text_to_image/r1")  # metrics of retrieval
_TEXTS = {
    "unseen": "unseen kinds",
    "known": "known kinds",
    "unseen_titles": "unseen kinds, by ten titles",
    "retrieval": "retrieval",
    "kind": "probe of kind",
    "season": "probe of season",
}
# Control: the explanation that it excludes.
_CONTROLS = {
    "same_optimizer": "its rate",
    "fixed_head": "an untrained head",
    "shuffled": "other pairs' pseudo-labels",
    "second_head": "a second head",
    "smoothing_0.1": "smoothing 0.1",
    "positives": "equal captions as matches",
    "gce": "generalised cross-entropy",
    "tokens": "tokens",
}


def _gains(*measures: str) -> tuple[ClaimPart, ...]:
    return tuple(ClaimPart(_TEXTS[name], name, ("final_xclip",), ("final_clip",)) for name in measures)


def _beyond_controls() -> Iterator[ClaimPart]:
    for measure in ("unseen", "kind"):
        for control, text in _CONTROLS.items():
            yield ClaimPart(f"{_TEXTS[measure]}, beyond {text}", measure, ("final_xclip",), (f"control_{control}",))


def _more_than(first: tuple[str, str], second: tuple[str, str]) -> Iterator[ClaimPart]:
    """Yield parts by which xCLIP gains more over CLIP in the first pair than in the second; pairs are (xCLIP, CLIP).

    Models of tight captions retrieve tight captions.
    """
    for measure in ("unseen", "known", "kind", "retrieval"):
        tight = ":retrieval_tight" if measure == "retrieval" and "tight" in second[0] else ""
        plus = (first[0], second[1] + tight)
        minus = (first[1], second[0] + tight)
        yield ClaimPart(_TEXTS[measure], measure, plus, minus)


CLAIMS = (
    Claim("On loose titles, after equal time, xCLIP names better and has better features.", _gains("unseen", "kind")),
    Claim("Its gain holds in every family.", _gains("unseen", "known", "unseen_titles", "retrieval", "kind", "season")),
    Claim("The clusters cause the gain.", tuple(_beyond_controls())),
    Claim(
        "It gains more on loose captions than on tight ones.",
        tuple(_more_than(("final_xclip", "final_clip"), ("captions_tight_xclip", "captions_tight_clip"))),
    ),
    Claim(
        "It loses less with a small batch.",
        tuple(_more_than(("batch_64_xclip", "batch_64_clip"), ("batch_512_xclip", "batch_512_clip"))),
    ),
)
