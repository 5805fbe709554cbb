import gzip
import json

import jax
import pytest

from tests.helpers import tiny
from xclip_jax.core.run_folder import RunFolder
from xclip_jax.data import loader
from xclip_jax.train import loop, trainer


def config(pairs, run, **changes):
    return tiny.config("clip", run=run, **{"data__sources": (f"folder:{pairs}",), "log__profile": (2, 3)} | changes)


def traced_file(run, end):
    """The only file of the run's traces whose name ends in `end`."""
    (path,) = (run / "profile" / "plugins" / "profile").glob(f"*/*{end}")
    return path


def events(run):
    """(step, start, end) of the step annotations, and (name, start, end) of all else, in nanoseconds."""
    data = jax.profiler.ProfileData.from_file(str(traced_file(run, ".xplane.pb")))
    lines = [event for plane in data.planes for line in plane.lines for event in line.events]
    steps = [(dict(event.stats).get("step_num"), event) for event in lines if event.name == "train"]
    return (
        sorted((step, event.start_ns, event.end_ns) for step, event in steps),
        [(event.name, event.start_ns, event.end_ns) for event in lines if event.name != "train"],
    )


def test_a_run_leaves_a_trace_of_its_steps(pairs, tmp_path, capsys):
    trainer.run(config(pairs, tmp_path / "run", steps=4))
    steps, others = events(tmp_path / "run")
    assert [step for step, *_ in steps] == [2, 3]
    assert len(others) > 100
    files = [traced_file(tmp_path / "run", end) for end in ("perfetto_trace.json.gz", ".trace.json.gz")]
    traces = [json.loads(gzip.decompress(file.read_bytes())) for file in files]
    for trace in traces:
        annotated = [event for event in trace["traceEvents"] if event.get("name") == "train"]
        assert sorted(int(event["args"]["step_num"]) for event in annotated) == [2, 3]
    assert "metadata" not in traces[0]  # which Perfetto does not read
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("profile of steps 2 to 3")]
    assert len(said) == 1 and f"xprof --logdir {tmp_path / 'run' / 'profile'}" in said[0]


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_a_run_that_stops_leaves_what_it_traced_and_one_past_the_steps_traces_nothing(pairs, tmp_path, monkeypatch):
    c, seen = config(pairs, tmp_path / "run", steps=6, log__profile=(2, 5), checkpoint__every=1), []
    original = loader.to_global

    def counted(batch, mesh):
        seen.append(batch)
        if len(seen) == 4:
            raise Stopped
        return original(batch, mesh)

    monkeypatch.setattr(loader, "to_global", counted)
    with pytest.raises(Stopped):
        trainer.run(c)
    monkeypatch.undo()
    assert [step for step, *_ in events(tmp_path / "run")[0]] == [2, 3]
    c.log.profile = (1, 2)
    trainer.run(c)
    assert len(tiny.lines(tmp_path / "run")) == 6
    assert [step for step, *_ in events(tmp_path / "run")[0]] == [2, 3]


def test_the_trace_waits_for_the_steps_before_it_and_in_it(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: calls.append(("wait", x)) or x)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_, **__: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    tracer = loop.StepTracer((4, 5), RunFolder(tmp_path))
    for step in range(3, 8):
        assert tracer(step, lambda x: calls.append(x) or x + 1, 10 * step) == 10 * step + 1
    tracer.close()
    assert calls == [30, ("wait", (40,)), "start", 40, 50, ("wait", 51), "stop", 60, 70]
    calls.clear()
    tracer = loop.StepTracer((4, 6), RunFolder(tmp_path))  # of a run that resumed at step 4
    for step in (5, 6, 7):
        tracer(step, calls.append, step)
    assert calls == [("wait", (5,)), "start", 5, 6, ("wait", None), "stop", 7]


def test_a_trace_that_fails_is_a_warning(tmp_path, capsys):
    """Another trace is in progress; the run's folder cannot be written to."""
    tracer = loop.StepTracer((1, 2), RunFolder(tmp_path / "run"))
    with jax.profiler.trace(tmp_path / "other"):
        assert [tracer(step, lambda x: x, step) for step in (1, 2, 3)] == [1, 2, 3]
    tracer.close()
    assert "WARNING: the steps of log.profile cannot be traced: Profile has already" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    tracer = loop.StepTracer((1, 2), RunFolder(tmp_path / "file"))
    assert [tracer(step, lambda x: x, step) for step in (1, 2, 3)] == [1, 2, 3]
    out = capsys.readouterr().out
    assert "WARNING: the steps of log.profile cannot be traced" in out and out.count("\n") == 1
    with jax.profiler.trace(tmp_path / "other"):  # the profiler is free again
        pass
