"""Texts and labels of GLUE from its published files."""

import pytest

from xclip_jax.core.errors import UserError
from xclip_jax.data.readers import glue


def test_incomplete_rows_of_glue_are_counted_and_many_refused(tmp_path, capsys):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\tWhat {i}?\tWhy?\t{i % 2}" for i in range(300)]
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    assert len(glue.read("qqp", "validation", str(tmp_path))[0]) == 300
    assert capsys.readouterr().out == ""
    rows[7], rows[9] = "7\t1\t2\tWhat?\t\t1", "9\t1\t2\tWhat?"
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    texts, labels = glue.read("qqp", "validation", str(tmp_path))
    assert len(texts) == len(labels) == 298
    message = "dev.tsv': 2 of 300 rows lack a text or the label (1 end too early) and are left out\n"
    assert capsys.readouterr().out.endswith(message)
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows[:100]]))
    with pytest.raises(UserError, match=r"dev\.tsv': 2 of 100 rows lack .* \(1 end too early\); the file is damaged"):
        glue.read("qqp", "validation", str(tmp_path))
