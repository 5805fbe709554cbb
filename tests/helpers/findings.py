"""What tests of the doctor share."""

from xclip_jax.train.checks import OK


def only(findings, check, mark):
    """The one finding of `check`, which has `mark`; FAILs and warnings have a remedy, there or in the text."""
    findings = [each for each in findings if each.check == check]
    (finding,) = [each for each in findings if each.mark != OK] or findings
    assert finding.mark == mark, finding
    assert "\n" not in finding.line() and finding.line().startswith(mark)
    return finding
