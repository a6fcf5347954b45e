"""The README's figures are the committed ones."""

import json
import sys

import pytest
from plugin.commands import ROOT

from ap_fairseq.cli.evaluate import format_markdown


@pytest.mark.parametrize("name", ["cpu", "h200"])
def test_result_tables_are_generated_from_the_committed_results(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split(f"<!-- results: {name} -->\n")[1].split("\n<!-- end -->")[0]
    results = json.loads((ROOT / f"examples/libreoffice_help/results/{name}.json").read_text(encoding="utf-8"))
    assert table == format_markdown(results)


def test_sample_table_is_generated_from_the_committed_results():
    sys.path.insert(0, str(ROOT / "scripts"))
    from sample_error import format_markdown as format_samples

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("<!-- results: sample -->\n")[1].split("\n<!-- end -->")[0]
    assert table == format_samples(json.loads((ROOT / "scripts/sample_error.cpu.json").read_text(encoding="utf-8")))
