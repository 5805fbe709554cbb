"""The page of a run: one HTML file with all images, styles and the script inside."""

from collections.abc import Sequence

import jax
from etils import epath

from xclip_jax.core.console import command
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.evaluators.encoder import Encoder
from xclip_jax.models.two_towers import Variables
from xclip_jax.report import health, model_sections, record, run_sections, shell
from xclip_jax.report.attention import Maps, attention
from xclip_jax.report.examples import Examples, collect_examples
from xclip_jax.report.markup import Images, esc
from xclip_jax.report.record import Record
from xclip_jax.train.build import Experiment, profile_of_run

_NO_SETS = "the run has no evaluation sets. Add some to eval.final_sets, or run: {report} {run} --sets NAME,NAME"


def make(
    run: str | epath.Path,
    experiment: Experiment,
    encoder: Encoder,
    variables: Variables,
    specs: Sequence[str],
    *,
    data_dir: str = "",
    output: str | epath.Path = "",
    seed: int = 0,
) -> Examples:
    """Collect examples of a model and write the page of its run; with several processes all call this, one writes.

    Args:
      run: the run directory.
      experiment, encoder, variables: the model.
      specs: evaluation sets, see `examples.collect_examples`.
      data_dir: root of the data sets, "" for that of the run.
      output: file of the page, RUN/report.html by default.
      seed: of the examples that are shown.

    Returns:
      The examples on the page.
    """
    examples = collect_examples(
        encoder,
        variables,
        specs,
        data=experiment.config.data,
        data_dir=data_dir,
        data_seed=experiment.config.seed,
        pairs=not experiment.objective.labelled,
        seed=seed,
        profile=profile_of_run(experiment.config),
    )
    maps = None
    if examples.gallery.images:
        statistics = (experiment.preprocessing.mean, experiment.preprocessing.std)
        maps = attention(experiment.model, variables, examples.gallery.images, statistics, experiment.mesh, seed=seed)
    if jax.process_index() == 0:
        parameters = sum(x.size for x in jax.tree.leaves(experiment.abstract.params))
        page = render(record.read(run), examples, maps, parameters)
        epath.Path(output or RunFolder(run).report_file).write_text(page)
    return examples


def render(record: Record, examples: Examples, maps: Maps | None = None, parameters: int | None = None) -> str:
    """Return the page of a run.

    Args:
      record: contents of its directory.
      examples: predictions of its model; empty without a checkpoint.
      maps: attention over images of `examples.gallery`.
      parameters: number of the model's parameters, if known.
    """
    images = Images()
    reason = " ".join(examples.missing) or _NO_SETS.format(report=command("report"), run=record.folder)
    has_clusters = "s_img" in record.objective.outputs(record.config.model)
    no_clusters = reason if has_clusters else "this objective trains no cluster heads."
    sections = [
        model_sections.names(examples, images, reason),
        model_sections.search(examples, images, reason),
        model_sections.clusters(examples, images, no_clusters),
        model_sections.attention(examples, images, maps, reason),
        model_sections.confusion(examples, images, reason),
        run_sections.results(record),
        run_sections.curves(record),
        health.health(record),
        run_sections.about(record),
    ]
    credit = "".join(f"<p>{esc(credit)}</p>" for credit in examples.credits)
    return shell.page(
        f"{run_sections.title(record)} · {record.folder.name}",
        run_sections.head(record, parameters),
        sections,
        images,
        # Without examples each of their sections has these sentences.
        notes=examples.missing if examples.named or examples.retrieved else [],
        footer=f"<p>Made by <code>{command('report')} {esc(record.folder)}</code>. Examples are drawn by seed "
        f"{examples.seed}, not selected by hand.</p>{credit}",
    )
