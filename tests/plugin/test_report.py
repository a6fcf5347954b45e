"""The report says what the recordings, masks and scores say, and its page can be read by everyone."""

import base64
import contextlib
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from plugin.builders import random_stats
from plugin.commands import ROOT

from ap_fairseq.artifacts import AttentionStats, PruningMasks
from ap_fairseq.cli import report as cli
from ap_fairseq.files import UserError
from ap_fairseq.pruning.build import build_masks
from ap_fairseq.pruning.spec import MaskSpec
from ap_fairseq.pruning.summary import summarize
from ap_fairseq.report import analysis, build, content, export, page, tables
from ap_fairseq.report.figure import KIND_COLOURS
from ap_fairseq.report.systems import System
from ap_fairseq.sites import AttentionKind

ENCODER, DECODER, CROSS = AttentionKind


# -- the folder, from a real recording --------------------------------------------------------------------------------


def ap_report(*argv) -> None:
    cli.main([str(argument) for argument in argv])


@pytest.fixture(scope="module")
def stats_file():
    """Written by ap-record --max-positions 24 for the CPU quickstart's model after 300 updates of its training."""
    return ROOT / "tests/plugin/quickstart_stats.safetensors"


@pytest.fixture(scope="module")
def masks_file(stats_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "masks.safetensors"
    build_masks(AttentionStats.load(stats_file), MaskSpec({kind: 0.5 for kind in AttentionKind})).masks.save(path)
    return path


@pytest.fixture(scope="module")
def scores_file(tmp_path_factory):
    """The committed scores of the CPU quickstart, with an interval and a hostile name."""
    document = json.loads((ROOT / "examples/libreoffice_help/results/cpu.json").read_text(encoding="utf-8"))
    document["significance"] = {"systems": {"dense": {"bleu": {"score": 16.42, "ci95": 1.25}}}}
    document["systems"][1]["system"] = "</script><b>per-kind_&.untuned"
    path = tmp_path_factory.mktemp("scores") / "results.json"
    path.write_text(json.dumps(document))
    return path


@pytest.fixture(scope="module")
def printed(stats_file, masks_file, scores_file, tmp_path_factory):
    """The folder of a report, and what writing it prints."""
    folder, printed = tmp_path_factory.mktemp("report") / "report", io.StringIO()
    inputs = ["--stats", stats_file, "--masks", masks_file, "--results", scores_file]
    with contextlib.redirect_stdout(printed):
        ap_report(*inputs, "--benchmark", ROOT / "scripts/bench_attention.h100.json", "-o", folder)
    return folder, printed.getvalue()


@pytest.fixture(scope="module")
def folder(printed):
    return printed[0]


class Page(HTMLParser):
    """What a page refers to, its scripts by id, and the alternative texts of its figures."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.scripts, self.alternatives, self.ids, self.inside = [], {}, [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [value for name, value in attributes.items() if name in ("src", "href", "xlink:href", "action")]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if attributes.get("role") == "img":
            self.alternatives.append(attributes.get("aria-label"))
        self.inside = attributes.get("id", "") if tag == "script" else None

    def handle_data(self, text):
        if self.inside is not None:
            self.scripts[self.inside] = self.scripts.get(self.inside, "") + text


def no_constant(name):
    raise AssertionError(f"{name} in JSON")


def test_every_figure_is_a_picture_and_a_vector_drawing(folder):
    names = {path.stem for path in (folder / "figures").iterdir()}
    expected = {"support", "kept_mass", "nominal", "concentration", "patterns", "layer_sparsity", "quality", "speed"}
    expected |= {"seen_by"}
    by_kind = {
        f"{what}_{kind.value}{end}"
        for what, end in (("attention", "_masks"), ("overview", ""))
        for kind in AttentionKind
    }
    assert names == expected | {"memory"} | by_kind
    for name in names:
        pixels = matplotlib.image.imread(folder / "figures" / f"{name}.png")
        assert min(pixels.shape[:2]) > 200 and pixels.std() > 0.01
        assert xml.etree.ElementTree.parse(folder / "figures" / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_summary_says_what_the_files_say(folder, stats_file, masks_file):
    summary = json.loads((folder / "summary.json").read_text(), parse_constant=no_constant)
    stats, masks = AttentionStats.load(stats_file), PruningMasks.load(masks_file)
    assert summary["sentences"] == stats.metadata["sentences"] == 33025
    rows = {(row["kind"], row["layer"]): row for row in summary["masks"]["masks"]["rows"]}
    for row in summarize(masks, stats):
        assert rows[row.kind, row.layer]["effective"] == row.effective
    kept = summary["kinds"]["cross"]["kept_mass"]["kind"]
    at = rows["cross", None]
    assert np.interp(at["effective"], kept["sparsity"], kept["kept"]) == pytest.approx(at["kept_mass"], abs=1e-3)
    assert summary["provenance"]["recording"]["checkpoint"] == stats.metadata["checkpoint"]
    shares = summary["kinds"]["encoder_self"]["concentration"]["end"]
    assert 0 < shares["mean"] < 1
    assert set(summary["differences"]) >= {"What can be pruned", "Entropy", "Positions", "Patterns", "Heads"}


def test_tables_for_papers(folder):
    markdown, latex = (folder / "table.md").read_text(), (folder / "table.tex").read_text()
    assert re.search(r"\| masks +\| cross +\| +(49|50)\.\d% \|", markdown)
    assert re.search(r"\| dense +\| dense +\|( +– \|){3} +16.42 ± 1.25 \| +43.30 \| +– \|", markdown)
    name = r"\ensuremath{<}/script\ensuremath{>}\ensuremath{<}b\ensuremath{>}per-kind\_\&.untuned"
    assert re.search(re.escape(name) + r" +& mean, no fine-tuning +& +50.0\\% +&", latex)
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == latex.count(r"\toprule") == 3


def test_nominal_sparsity_is_shown_for_masks_with_nominal_budgets_alone():
    """An all-ones mask was listed with a nominal sparsity: cells that never exist count as pruned."""
    stats = random_stats(layers=1)
    built = {
        "mean": build_masks(stats, MaskSpec({CROSS: 0.5})).masks,
        "published": build_masks(stats, MaskSpec({CROSS: 0.5}, criterion="percentile")).masks,
    }
    table = content.Report(stats, {"mean": built["mean"]}, []).masks_table
    assert "nominal" not in table.header and len(table.rows[0]) == len(table.header)
    table = content.Report(stats, built, []).masks_table
    column = {row[0]: row[table.header.index("nominal")] for row in table.rows if row[1] == "cross"}
    assert column["mean"] == "–" and column["published"].endswith("%")


def test_the_page_is_one_file(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert {link for link in parsed.links if not link.startswith(("#", "data:"))} == set()
    assert "@import" not in text and "fetch(" not in text and not re.search(r"url\((?!#)", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "</script><b>" not in text and "&lt;/script&gt;&lt;b&gt;per-kind_" in text
    assert len(parsed.alternatives) >= 8
    labelled = [text for text in parsed.alternatives if text is not None]
    assert len(labelled) == len(parsed.alternatives) - 1  # the script labels the heat map, by the head in view
    assert all(len(text) > 20 for text in labelled)
    json.loads(parsed.scripts["data"], parse_constant=no_constant)


def test_the_page_opens_with_a_picture_and_a_sentence_for_each_kind(folder, stats_file, masks_file):
    text = (folder / "report.html").read_text(encoding="utf-8")
    stats, masks = AttentionStats.load(stats_file), PruningMasks.load(masks_file)
    opening = text[text.index("<main>") : text.index('<section id="explorer">')]
    for row in (row for row in summarize(masks, stats) if row.layer is None):
        figure = re.search(rf'<figure id="figure-overview_{row.kind}">(.*?)</figure>', opening, re.DOTALL)[1]
        assert figure.count("<image ") >= 2  # mean attention and mask; their colour bars may be images, too
        assert f"kept: {1 - row.effective:.1%} of the pairs" in re.search(r'aria-label="([^"]*)"', figure)[1]
        caption = re.search(r"<figcaption>(.*?)</figcaption>", figure)[1]
        assert f"prune {row.effective:.1%} of the pairs and keep {row.kept_mass:.1%} of the attention mass" in caption
        assert caption.count(".") - len(re.findall(r"\d\.\d", caption)) == 1  # one sentence
    assert "<details open" not in text and text.count("<details>") >= 8  # long paragraphs are folded


def test_the_terminal_shows_about_ten_lines(printed):
    """It printed the eight paragraphs of the page."""
    lines = printed[1].splitlines()
    assert len(lines) <= 10 and max(map(len, lines)) <= 130
    assert lines[0].startswith("Recorded on 33,025 sentence pairs") and lines[-1].endswith("report.html")
    assert [line.split(":")[0] for line in lines[1:5]] == [*AttentionKind, "masks"]
    assert "4 systems: BLEU 15.08" in lines[-2] and "to 16.46 (dense.tuned)" in lines[-2]


def test_one_system_without_intervals_is_reported_as_that(stats_file):
    """It was "1 systems: BLEU 3.82 (p) to 3.82 (p)", and the table explained a ± that it did not have."""
    system = System("p", "importance", "", ["cross"], {"cross": 0.5}, 0.5, {"BLEU": 3.82, "chrF2": 17.67})
    assert content.Report(AttentionStats.load(stats_file), {}, [system]).digest[-1] == "1 system: BLEU 3.82 (p)"
    assert tables.systems_table([system]).caption == "Translation scores and effective sparsity."
    system.half_widths["BLEU"] = 0.5
    assert "± is half of the 95% bootstrap interval" in tables.systems_table([system]).caption


def array(parsed: Page, name: str, dtype) -> np.ndarray:
    return np.frombuffer(gzip.decompress(base64.b64decode(parsed.scripts[name])), dtype)


def test_the_page_holds_the_recording_and_the_masks(folder, stats_file, masks_file):
    parsed = Page((folder / "report.html").read_text(encoding="utf-8"))
    data = json.loads(parsed.scripts["data"])
    stats, masks = AttentionStats.load(stats_file), PruningMasks.load(masks_file)
    low, high = data["low"], data["high"]
    step = (high / low) ** (1 / 254)
    for k in data["kinds"]:
        kind = AttentionKind(k["name"])
        support = array(parsed, f"support-{kind.value}", "<f4").reshape(k["rows"], k["columns"])
        np.testing.assert_array_equal(support, stats.support[kind])
        for layer in range(k["layers"]):
            codes = array(parsed, f"mean-{kind.value}-{layer}", np.uint8).reshape(stats.mass[kind][layer].shape)
            mean = stats.mean(kind)[layer]
            np.testing.assert_array_equal(codes == 0, mean == 0)
            read = low * step ** (codes.astype(float) - 1)
            np.testing.assert_allclose(read[mean > low], mean[mean > low], rtol=step**0.5 - 1 + 1e-9)
            kept = array(parsed, f"kept-0-{kind.value}-{layer}", np.uint8).reshape(codes.shape)
            seen = np.broadcast_to(stats.support[kind] > 0, codes.shape)
            np.testing.assert_array_equal(kept[seen] == 255, masks.keep[kind][layer][seen])
            assert set(np.unique(kept)) <= {0, 255}


def one_kind(kind, stats):
    return AttentionStats({kind: stats.mass[kind]}, {kind: stats.support[kind]}, {})


def test_figures_alone(tmp_path):
    one_kind(CROSS, random_stats(layers=1)).save(tmp_path / "s.safetensors")
    ap_report("figures", "--stats", tmp_path / "s.safetensors", "-o", tmp_path / "figures")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"attention_cross.png", "attention_cross.svg", "kept_mass.png"} <= names
    assert not {"quality.png", "report.html"} & names


# -- unusual recordings -----------------------------------------------------------------------------------------------


UNUSUAL = {
    "one token": random_stats(layers=1, heads=1, longest=(1, 1), sentences=0),
    "cross alone": one_kind(CROSS, random_stats(layers=1)),
    "a head without mass": random_stats(layers=1),
}
UNUSUAL["a head without mass"].mass[ENCODER][0, 1] = 0


@pytest.mark.parametrize("name", UNUSUAL)
@pytest.mark.filterwarnings("error")
def test_unusual_recordings_give_a_whole_report(name):
    stats = UNUSUAL[name]
    report = content.Report(stats, {"m": build_masks(stats, MaskSpec({CROSS: 0.5})).masks}, [])
    json.dumps(report.summary(), allow_nan=False)
    text = page.render(report, report.figures())
    assert not re.search(
        r"\bnan\b|\bNone\b|\binf\b", re.sub(r"<(script|style|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
    )
    json.loads(Page(text).scripts["data"], parse_constant=no_constant)


def test_large_recordings_are_binned_with_a_note(monkeypatch):
    stats = random_stats(layers=1, longest=(40, 40))
    masks = build_masks(stats, MaskSpec({CROSS: 0.5})).masks
    monkeypatch.setattr(content, "MOST_CELLS", 3 * 2 * 20 * 20)
    report = content.Report(stats, {"m": masks}, [])
    parsed = Page(page.render(report, []))
    data = json.loads(parsed.scripts["data"])
    assert [k["factor"] for k in data["kinds"]] == [2, 2, 2]
    assert "each cell shown is the mean of up to 2 x 2 positions" in page.render(report, [])
    kept = array(parsed, "kept-0-cross-0", np.uint8).reshape(2, 20, 20) / 255
    pairs = analysis._binned(stats.support[CROSS], 2)
    assert (kept * pairs).sum() / (2 * pairs.sum()) == pytest.approx(
        next(row.kept_mass and 1 - row.effective for row in summarize(masks, stats) if row.kind == "cross"), abs=2e-3
    )


def test_vanished_heads_are_named():
    stats = random_stats(layers=1)
    masks = build_masks(stats, MaskSpec({})).masks
    masks.keep[CROSS][0, 1, :, 1:] = False
    report = content.Report(stats, {"m": masks}, [])
    lost = "nothing but the guaranteed cells (one in each row) is kept by 1 of 2 heads of cross (layer.head): 0.1"
    assert report.vanished == [f"Under masks “m”, {lost}."]


@pytest.mark.parametrize("lost", [[CROSS], [ENCODER, DECODER, CROSS]])
@pytest.mark.filterwarnings("error")
def test_kinds_that_a_pruned_model_has_lost(lost):
    """They were called the most concentrated of all, and kept to 100%; figures by offset failed."""
    stats = random_stats(layers=1)
    for kind in lost:
        stats.mass[kind][:] = 0
    stats.relative.mass[:] = 0
    spec = MaskSpec(dict.fromkeys([ENCODER, DECODER, CROSS], 0.8), granularity="scaled-diagonal", empty_rows=True)
    report = content.Report(stats, {"m": build_masks(stats, spec).masks}, [])
    page.render(report, report.figures())
    json.dumps(report.summary(), allow_nan=False)
    table = tables.markdown(report.tables).partition("Attention of the recorded model")[0]
    for kind in stats.kinds:
        gone = kind in lost
        assert gone == (report.overview[kind] == "The recorded model has no attention of this kind left.")
        assert gone == (kind.value not in table)
        assert gone == (kind.value not in str(report.differences))


# -- colours ----------------------------------------------------------------------------------------------------------

# Matrices of severity 1 of Machado, Oliveira and Fernandes 2009 (doi 10.1109/TVCG.2009.113).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def lab(colour: str, deficiency) -> np.ndarray:
    """CIELAB (D65) of a #rrggbb colour as somebody with a colour vision deficiency sees it."""
    rgb = np.array([int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = (np.array(deficiency) @ linear).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(np.maximum(xyz / [0.9505, 1, 1.089], 0.008856))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("name", DEFICIENCIES)
def test_kinds_differ_for_the_colour_blind(name):
    colours = [lab(colour, DEFICIENCIES[name]) for colour in KIND_COLOURS.values()]
    distances = [np.linalg.norm(a - b) for k, a in enumerate(colours) for b in colours[:k]]
    assert min(distances) > 12


# -- export -----------------------------------------------------------------------------------------------------------


def test_exported_arrays_are_the_mean_attention(stats_file, tmp_path):
    ap_report("export", "--stats", stats_file, "--format", "npz", "-o", tmp_path / "mean.npz")
    stats = AttentionStats.load(stats_file)
    with np.load(tmp_path / "mean.npz", allow_pickle=False) as archive:
        for kind in AttentionKind:
            np.testing.assert_array_equal(archive[f"{kind.value}.mean"], stats.mean(kind))
            np.testing.assert_array_equal(archive[f"{kind.value}.support"], stats.support[kind])
        assert json.loads(str(archive["metadata"]))["checkpoint"] == stats.metadata["checkpoint"]


def test_exported_json_has_the_shape_of_bertviz_and_the_example_reads_both(stats_file, tmp_path):
    ap_report("export", "--stats", stats_file, "--format", "bertviz-json", "--positions", 6, "-o", tmp_path / "m.json")
    arguments = json.loads((tmp_path / "m.json").read_text(), parse_constant=no_constant)
    for name in ("encoder_attention", "decoder_attention", "cross_attention"):
        weights = np.array(arguments[name])
        assert weights.shape == (2, 1, 4, 6, 6)
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert arguments["encoder_tokens"] == arguments["decoder_tokens"] == list("012345")
    ap_report("export", "--stats", stats_file, "-o", tmp_path / "m.npz")
    for file in ("m.json", "m.npz"):
        command = [sys.executable, str(ROOT / "examples/mean_attention.py"), str(tmp_path / file)]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "2 layers, 4 heads" in printed and re.search(r"0\.1: most from query \d+ to key \d+, 0\.\d{3}", printed)
    for word, status, said in (("--help", 0, "ap-report export"), ("none.npz", 2, "none.npz does not exist; make")):
        ended = subprocess.run([*command[:2], word], capture_output=True, text=True)
        assert ended.returncode == status and said in ended.stdout + ended.stderr


def test_bad_exports_are_refused(tmp_path):
    with pytest.raises(UserError, match="number of positions is 0, expected at least 1"):
        export.export(random_stats(), tmp_path / "x", "npz", 0)
    with pytest.raises(UserError, match="format 'xml' is not one of npz, bertviz-json"):
        export.export(random_stats(), tmp_path / "x", "xml", None)
    assert os.listdir(tmp_path) == []


# -- the command ------------------------------------------------------------------------------------------------------


def test_bad_calls_end_with_one_clear_line(folder, stats_file, masks_file, scores_file, tmp_path, capsys):
    (tmp_path / "file").touch()
    shutil.copy(scores_file, tmp_path / "again.json")
    shutil.copy(masks_file, tmp_path / "masks.safetensors")
    other = random_stats()
    other.save(tmp_path / "other.safetensors")
    new = tmp_path / "new"
    for argv, message in [
        (["--stats", stats_file, "-o", folder], "already holds report.html, summary.json, .*pass --overwrite"),
        (["--stats", stats_file, "-o", tmp_path / "file"], "is a file; name a folder"),
        (["--stats", stats_file, "-o", tmp_path / "a" / "b"], "folder .*a does not exist; create it first"),
        (
            ["export", "--stats", stats_file, "-o", stats_file, "--overwrite"],
            "output .* is the input .*stats.safetensors",
        ),
        (["--stats", tmp_path / "no", "-o", new], "no does not exist; expected attention statistics"),
        (["--stats", masks_file, "-o", new], "has format 'ap-pruning-masks-2', expected 'ap-attention-stats-2'"),
        (
            ["--stats", tmp_path / "other.safetensors", "--masks", masks_file, "-o", new],
            "masks masks are for .* 4 heads, the statistics for .* 2 heads",
        ),
        (
            ["--stats", stats_file, "--masks", masks_file, tmp_path / "masks.safetensors", "-o", new],
            "two mask files are called masks; rename",
        ),
        (["--stats", stats_file, "--results", tmp_path / "no.json", "-o", new], "no.json does not exist"),
        (
            ["--stats", stats_file, "--results", scores_file, "--results", tmp_path / "again.json", "-o", new],
            "system dense has two results, in .*results.json and in .*again.json; rename it",
        ),
    ]:
        with pytest.raises(SystemExit) as stop:
            ap_report(*argv)
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and re.search(f"error: .*{message}", printed), printed
        assert "Traceback" not in printed
    assert not new.exists()


# -- in a browser -----------------------------------------------------------------------------------------------------

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser():
    if not (CHROMIUM and DRIVER):
        pytest.skip("no chromium and chromedriver here; Debian: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Reader:
    """A person in front of the page."""

    def __init__(self, browser, path, width: int, theme: str):
        from selenium.webdriver.support.wait import WebDriverWait

        self.browser, self.wait = browser, WebDriverWait(browser, 20, 0.02)
        features = [{"name": "prefers-color-scheme", "value": theme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        self.settle()

    def settle(self):
        """Wait until the latest choice is drawn."""
        self.wait.until(lambda b: b.execute_script("return Number(document.body.dataset.ready) === generation"))

    def run(self, script: str):
        return self.browser.execute_script(script)

    def find(self, selector: str):
        return self.browser.find_element("css selector", selector)

    def choose(self, selector: str):
        self.find(selector).click()
        self.settle()

    def select(self, name: str, value):
        self.run(f"$('{name}').value = '{value}'; $('{name}').dispatchEvent(new Event('change'))")
        self.settle()

    def click_cell(self, query: int, key: int) -> str:
        """Click the middle of a cell of the large heat map and read the text below it."""
        from selenium.webdriver import ActionChains

        g = self.run("$('cells').scrollIntoView({block: 'center'}); return {...geometry(), ...MARGIN}")
        x = g["left"] + (key + 0.5) * g["width"] / g["columns"]
        y = g["top"] + (query + 0.5) * g["height"] / g["rows"]
        canvas = self.find("#cells")
        size = canvas.size
        ActionChains(self.browser).move_to_element_with_offset(
            canvas, round(x - size["width"] / 2), round(y - size["height"] / 2)
        ).click().perform()
        return self.text()

    def text(self) -> str:
        return self.find("#readout").text

    def errors(self):
        return [entry for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("width, theme", [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_a_reader_finds_the_recorded_values(browser, folder, stats_file, masks_file, width, theme):
    reader = Reader(browser, folder / "report.html", width, theme)
    stats, masks = AttentionStats.load(stats_file), PruningMasks.load(masks_file)
    for kind, layer, head, query, key in [(ENCODER, 1, 0, 4, 3), (CROSS, 0, 1, 5, 2), (DECODER, 1, 1, 6, 6)]:
        reader.choose(f"input[value={kind.value}]")
        reader.choose(f"#grid button[data-layer='{layer}'][data-head='{head}']")
        said = reader.click_cell(query, key)
        assert said.startswith(f"{kind.value}, layer {layer}, head {head} ("), said
        found = re.search(
            rf"query {query}, key {key}: mean attention ([\d.e-]+), in ([\d,]+) sentences, (\w+) by masks", said
        )
        assert found, said
        mean = stats.mean(kind)[layer, head, query, key]
        assert float(found[1]) == pytest.approx(mean, rel=0.08)  # stored in steps, shown with two digits
        assert int(found[2].replace(",", "")) == stats.support[kind][query, key]
        assert (found[3] == "kept") == masks.keep[kind][layer, head, query, key]
    assert "does not exist, the key is a later token" in reader.click_cell(2, 5)
    assert reader.run("return document.documentElement.scrollWidth <= innerWidth")
    assert reader.run("return performance.getEntriesByType('resource').length") == 0
    assert reader.errors() == []


def test_the_keyboard_suffices(browser, folder):
    from selenium.webdriver.common.keys import Keys

    reader = Reader(browser, folder / "report.html", 1280, "light")
    cells = reader.find("#cells")
    reader.run("$('cells').focus()")
    cells.send_keys(Keys.ARROW_DOWN)
    assert "query 0, key 0" in reader.text()
    cells.send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert "query 2, key 1" in reader.text()
    cells.send_keys(Keys.ESCAPE)
    assert "query" not in reader.text()
    button = reader.find("#grid button[data-layer='1'][data-head='1']")
    button.send_keys(Keys.ENTER)
    reader.settle()
    assert button.get_attribute("aria-pressed") == "true" and "layer 1, head 1" in reader.text()
    assert "layer 1, head 1" in cells.get_attribute("aria-label")


def test_folded_paragraphs_open_with_the_keyboard(browser, folder):
    from selenium.webdriver.common.keys import Keys

    reader = Reader(browser, folder / "report.html", 390, "dark")
    details = reader.find("#differences details")
    paragraph = details.find_element("css selector", "p")
    assert not paragraph.is_displayed()
    details.find_element("css selector", "summary").send_keys(Keys.ENTER)
    assert paragraph.is_displayed() and "effective sparsity" in paragraph.text
    assert reader.run("return document.documentElement.scrollWidth <= innerWidth")


def test_choices_of_map_masks_and_positions(browser, folder):
    reader = Reader(browser, folder / "report.html", 1280, "light")
    reader.select("mask", -1)
    assert "by masks" not in reader.click_cell(3, 3)
    pixels = "return [...new Uint8Array($('cells').getContext('2d').getImageData(60, 60, 200, 200).data)].join()"
    before = reader.run(pixels)
    reader.select("map", "support")
    assert reader.run(pixels) != before and reader.find("#legend-high").text == "33,025"
    reader.run("$('positions').value = 5; $('positions').dispatchEvent(new Event('input'))")
    reader.settle()
    assert reader.find("#positions-text").text.startswith("5 of ")
    assert reader.run("return [geometry().rows, geometry().columns].join()") == "5,5"


def test_a_figure_is_laid_out_once_for_all_its_files(monkeypatch, tmp_path):
    """matplotlib laid each figure out anew for its PNG, its SVG and the page: a quarter of a report's time."""
    laid_out = []
    monkeypatch.setattr(
        matplotlib.layout_engine.ConstrainedLayoutEngine, "execute", lambda self, canvas: laid_out.append(canvas)
    )
    report = content.Report(random_stats(), {}, [])
    figures = report.figures()
    build.write_figures(figures, tmp_path)
    assert len(figures) > 4 and all(figure.inline_svg() for figure in figures)
    assert laid_out == [figure.canvas for figure in figures]
