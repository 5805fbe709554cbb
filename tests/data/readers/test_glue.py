"""Texts and labels of GLUE from its published files; tests/evaluators/sets and tests/integration read all kinds."""

import pytest

from xclip_jax.core.errors import UserError
from xclip_jax.data.readers import glue


def test_incomplete_rows_of_glue_are_counted(tmp_path, capsys):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\tWhat {i}?\tWhy?\t{i % 2}" for i in range(30)]
    rows[7], rows[9] = "7\t1\t2\tWhat?\t\t1", "9\t1\t2\tWhat?"
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    texts, labels = glue.read_pairs("qqp", "validation", str(tmp_path))
    assert len(texts) == len(labels) == 28
    assert "dev.tsv': 2 of 30 rows lack a text" in capsys.readouterr().out


def test_other_files_are_named(tmp_path):
    (tmp_path / "dev.tsv").write_text("sentence\tlabel\n")
    with pytest.raises(UserError, match=r"dev\.tsv' has no complete item of GLUE's sst2"):
        glue.read_pairs("sst2", "validation", str(tmp_path))
    for content, named in (("", "IndexError"), ("a\tb\n1\t2", "KeyError"), ("sentence\tlabel\na\t7", "ValueError")):
        (tmp_path / "train.tsv").write_text(content)
        with pytest.raises(UserError, match=rf"train\.tsv' is not a file of GLUE's sst2; .*{named}"):
            glue.read_pairs("sst2", "train", str(tmp_path))
