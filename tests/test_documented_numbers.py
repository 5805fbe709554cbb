"""Numbers that the pages state are those of the code: a change of one fails here until it is made in both places."""

import functools
import importlib
import pathlib

import pytest

from xclip_jax.data import length_groups

DOCS = pathlib.Path(__file__).parents[1] / "docs"
# Constant, or default of a config key, in a module of xclip_jax; its value; the page that states it, and how.
NUMBERS = (
    ("parallel.compiler:CACHE_BYTES", 2 * 2**30, "checkpoints.md", "is limited to 2 GiB"),
    ("parallel.compiler:CACHE_SECONDS", 0.1, "checkpoints.md", "Programs that compile in less than 0.1 s are not kept"),
    ("train.recovery:MOST_SKIPPED", 10, "checkpoints.md", "More than 10 in a row stop the run"),
    ("train.prepare:CAPTIONS", 1024, "performance.md", "chooses the groups from 1,024 captions"),
    ("data.length_groups:MAX_GROUPS", 4, "performance.md", "encoded in up to four groups"),
    ("data.length_groups:_MISFITS", 0.005, "performance.md", "all but half a percent of the batches fit"),
    ("data.length_groups:_LEAST_STEPS", 1000, "performance.md", "in runs of 1,000 steps or more and"),
    ("data.length_groups:_LEAST_SAVING", 0.05, "performance.md", "if at least 5 % of a step's FLOPs are saved"),
    ("core.errors:EXIT_RESUMABLE", 75, "checkpoints.md", 'ends with status 75, "try again"'),
    ("core.errors:EXIT_RESTART", 79, "checkpoints.md", "and exits with 79: start it again"),
    ("objectives.nclip:Nclip.sharpness", 1.0, "clusters.md", "With the default weights, sharpness 1 and smoothness 2"),
    ("objectives.nclip:Nclip.smoothness", 2.0, "clusters.md", "With the default weights, sharpness 1 and smoothness 2"),
    # Two that make 2.5 s.
    ("processes.watchdog:_MOMENT", 2.0, "checkpoints.md", "during its compilation | the run ends within 3 s"),
    ("processes.watchdog:_POLL_SECONDS", 0.5, "checkpoints.md", "during its compilation | the run ends within 3 s"),
    ("processes.watchdog:_WARNING", 60.0, "checkpoints.md", "reports its phase after 60 seconds"),
    ("config.schema:LogConfig.stall_limit", 1800.0, "checkpoints.md", "`log.stall_limit` seconds (1800, 0 for never)"),
    ("processes.runtime:HEARTBEAT_SECONDS", 25, "pods.md", "JAX ends the others after 25 s"),
    ("data.config:DataConfig.max_bad_fraction", 0.05, "data.md", "Above `data.max_bad_fraction` (5 %)"),
    ("data.images:MAX_PIXELS", 2**26, "data.md", "an image of more than 67 million pixels is refused"),
    (
        "evaluators.encoder:MAX_UNREADABLE",
        0.05,
        "protocols.md",
        "more than 5 % of a set, or of a probe's split, is an error",
    ),
    ("evaluators.feature_classifiers:NEIGHBOURS", 20, "protocols.md", "kNN is DINO's: k = 20, T = 0.07"),
    ("evaluators.feature_classifiers:TEMPERATURE", 0.07, "protocols.md", "kNN is DINO's: k = 20, T = 0.07"),
)


@pytest.mark.parametrize(("name", "value", "page", "phrase"), NUMBERS, ids=[row[0] for row in NUMBERS])
def test_a_number_is_as_documented(name: str, value: float, page: str, phrase: str) -> None:
    module, _, path = name.partition(":")
    assert functools.reduce(getattr, path.split("."), importlib.import_module(f"xclip_jax.{module}")) == value
    assert phrase in " ".join((DOCS / page).read_text().split())


def test_groups_are_chosen_from_the_documented_savings_and_steps_on() -> None:
    given = (0.05, 1000), (0.0499, 1000), (0.05, 999)
    assert [length_groups.worthwhile(saved, steps) for saved, steps in given] == [True, False, False]
