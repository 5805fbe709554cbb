"""Passwords and signatures of addresses, and keys of the environment, are in nothing that is written or shown."""

import io
import sys
import tarfile

import pytest

from tests.helpers import hub_server, tiny, web
from tests.train.test_callbacks import calls  # noqa: F401 a fixture
from xclip_jax import report
from xclip_jax.commands import check, doctor, embed, evaluate, export
from xclip_jax.commands import report as page
from xclip_jax.core.errors import UserError
from xclip_jax.train import trainer

pytestmark = pytest.mark.long

SECRETS = (web.PASSWORD, web.SIGNATURE, hub_server.TOKEN, "aws-secret-of-the-tests")


@pytest.fixture(scope="module")
def site(pairs):
    """A server with a tar of pairs, one of which has no caption."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for path in sorted(pairs.iterdir()):
            tar.add(path, path.name)
        for name, data in {"zz.png": (pairs / "000.png").read_bytes()[:-1], "zz.txt": b""}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with web.serve() as site:
        site.files["pairs.tar"] = content.getvalue()
        yield site


def leaks(content):
    return [secret for secret in SECRETS if secret.encode() in content]


def leaking_files(folder):
    return {
        str(path.relative_to(folder)): found
        for path in folder.rglob("*")
        if (found := leaks(str(path).encode() + (path.read_bytes() if path.is_file() else b"")))
    }


def config(site, run, address="", **changes):
    """Of a run on the tar, whose one bad record it is told to bear."""
    address = address or site.url("pairs.tar", secret=True)
    keys = {"data__sources": (f"tar:{address}",), "data__holdout": 0.3, "data__max_bad_fraction": 0.5}
    return tiny.short("", run, objective="clip", **keys | changes)


@pytest.mark.slow  # all commands, some half a minute
def test_secrets_are_in_nothing_that_is_written_shown_or_uploaded(site, server, calls, tmp_path, monkeypatch, capfd):  # noqa: F811
    run, address = tmp_path / "run", site.url("pairs.tar", secret=True)
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRETS[-1])
    monkeypatch.setattr(sys, "argv", ["xclip-jax", f"--config.data.sources=('tar:{address}',)"])
    keys = {
        "eval__sets_at_end": ("retrieval/holdout", f"retrieval/tar:{address}"),
        "eval__report": True,
        "log__trackers": ("tensorboard", "wandb", "trackio"),
    }
    trainer.run(config(site, run, **keys), [report.callback()])
    page.main([str(run), "--output", str(tmp_path / "page.html")])
    evaluate.main(["--checkpoint", str(run), "--suite", f"retrieval/tar:{address}"])
    doctor.main([str(run)])
    assert check.main([f"tar:{address}", "--max_bad_fraction", "0.5"]) == 0
    embed.main(["--checkpoint", str(run), "--images", address, "--out", str(tmp_path / "rows.parquet")])
    export.main(["--checkpoint", str(run), str(tmp_path / "out"), "--to", "safetensors", "--push", "lab/mine"])
    uploaded = repr(server.repositories["lab/mine"])
    with pytest.raises(UserError) as refused:
        trainer.run(config(site, tmp_path / "refused", address=f"{address}-old"))
    output = "".join(capfd.readouterr())

    card = (tmp_path / "out" / "README.md").read_text()
    shown = f"tar:http://127.0.0.1:{site.port}/secret/pairs.tar"
    assert shown in card and shown in (run / "config.json").read_text() and shown in output
    assert "zz" in (run / "bad_samples.jsonl").read_text()
    assert "lab/mine" in output and "status 403" in str(refused.value)
    assert leaking_files(tmp_path) == {}
    assert leaks(output.encode()) == leaks(uploaded.encode()) == leaks(repr(calls).encode()) == []
    assert leaks(str(refused.value).encode()) == leaks(repr(sys.argv).encode()) == []


def test_a_run_resumes_with_another_signature_and_keeps_none(site, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XCLIP_CACHE", str(tmp_path / "cache"))
    run = tmp_path / "run"
    trainer.run(config(site, run))
    (run / "results.json").unlink()
    with pytest.raises(SystemExit, match=r"retrieval/holdout: .*status 403"):
        evaluate.main(["--checkpoint", str(run), "--suite", "retrieval/holdout"])
    requests = len(site.requests)
    monkeypatch.setattr(web, "SIGNATURE", f"{SECRETS[1]}-renewed")
    trainer.run(config(site, run))
    assert len(site.requests) > requests
    output = capsys.readouterr().out
    assert "resuming at step 4" in output and leaks(output.encode()) == []
    assert leaking_files(tmp_path) == {}
