"""Texts and labels of GLUE from its published files."""

from xclip_jax.data.readers import glue


def test_incomplete_rows_of_glue_are_counted(tmp_path, capsys):
    head = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate"
    rows = [f"{i}\t1\t2\tWhat {i}?\tWhy?\t{i % 2}" for i in range(300)]
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    assert len(glue.read_pairs("qqp", "validation", str(tmp_path))[0]) == 300
    assert capsys.readouterr().out == ""
    rows[7], rows[9] = "7\t1\t2\tWhat?\t\t1", "9\t1\t2\tWhat?"
    (tmp_path / "dev.tsv").write_text("\n".join([head, *rows]))
    texts, labels = glue.read_pairs("qqp", "validation", str(tmp_path))
    assert len(texts) == len(labels) == 298
    assert capsys.readouterr().out.endswith("dev.tsv': 2 of 300 rows lack a text or the label and are left out\n")
