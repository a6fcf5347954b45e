"""The README's figures are the committed ones."""

import json

import pytest
from plugin.commands import ROOT

from ap_fairseq.cli.evaluate import format_markdown


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_result_tables_are_generated_from_the_committed_results(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split(f"<!-- results: {name} -->\n")[1].split("\n<!-- end -->")[0]
    results = json.loads((ROOT / f"examples/libreoffice_help/results/{name}.json").read_text(encoding="utf-8"))
    assert table == format_markdown(results)
