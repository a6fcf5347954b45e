"""The README's figures are the committed ones."""

import json

from plugin.commands import ROOT

from ap_fairseq.cli.evaluate import format_markdown


def test_the_result_table_is_generated_from_the_committed_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- results: begin -->\n")[1].split("\n<!-- results: end -->")[0]
    results = json.loads((ROOT / "examples/libreoffice_help/results/h200.json").read_text(encoding="utf-8"))
    assert table == format_markdown(results)
