"""The report in a real browser, opened from disk: what it draws, what it does when it is used, and whether it can be read."""

import shutil

import pytest

from src.reporting.page import write_report
from tests.reporting.fake_sweeps import make_sweep

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("no chromium, chromium-browser or google-chrome on PATH", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = sync_api.expect  # waits for what the page does in its own time

HEAT = '[aria-label="heat map of mean scores"]'
# Texts whose contrast to what is behind them is too low: WCAG wants 4.5.
UNREADABLE = """() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = getComputedStyle(at).backgroundColor;
      const [r, g, b, alpha = 1] = color.startsWith("color(") ? [0, 0, 0, 0] : channels(color);
      if (alpha > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text || !node.checkVisibility() || node.closest(".bar, script, .textpoint, .hoverlayer")) continue;
    const style = getComputedStyle(node);
    const color = node.closest("svg") ? style.fill : style.color;
    const [low, high] = [light(channels(color)), light(behind(node))].sort((a, b) => a - b);
    if ((high + 0.05) / (low + 0.05) < 4.5) found.push([node.tagName, node.textContent.trim().slice(0, 40), color]);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    sweeps = [
        make_sweep(root),
        make_sweep(
            root, "results/R4", title="Only Depo", tasks=("Depo",), variants=("NoPE", "ALiBi"), rates=(1e-3,), hops=()
        ),
    ]
    return write_report(sweeps, root / "out").as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def show(browser, address):
    """Opens the page, all of it drawn, once for each way of looking at it."""
    contexts, pages = [], {}

    def opened(theme="light", width=1440, scripts=True):
        key = theme, width, scripts
        if key not in pages:
            size = {"width": width, "height": 900}
            contexts.append(browser.new_context(viewport=size, color_scheme=theme, java_script_enabled=scripts))
            pages[key] = contexts[-1].new_page()
            watch(pages[key])
            pages[key].goto(address)
            if scripts:
                settle(pages[key])
        elif (
            scripts
        ):  # the pages are shared: what a test that failed has left open would lie over what the next one clicks
            pages[key].evaluate("document.getElementById('panel').close()")
        return pages[key]

    yield opened
    for context in contexts:
        context.close()


ERRORS = []


def watch(page):
    page.on("pageerror", lambda error: ERRORS.append(str(error)))
    page.on("console", lambda message: ERRORS.append(message.text) if message.type in ("error", "warning") else None)
    local = ("file:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else ERRORS.append(request.url))


@pytest.fixture(autouse=True)
def no_errors():
    """Neither the page nor its console says that something is wrong, and nothing is asked from a network."""
    ERRORS.clear()
    yield
    assert ERRORS == []


def settle(page):
    page.wait_for_function("document.documentElement.dataset.drawn === 'all'")


def click_cell(page, heat, column, columns, row, rows):
    heat.scroll_into_view_if_needed()
    box = heat.locator(".nsewdrag").bounding_box()
    x = box["x"] + box["width"] * (column + 0.5) / columns
    page.mouse.click(x, box["y"] + box["height"] * (row + 0.5) / rows)


def test_figures_are_drawn(show):
    page = show()
    plots = page.locator(".js-plotly-plot")
    # Forest, heat map; curves 2 x 2, rates 2, hops 2, costs 2 x 3; and of the second sweep 1 + 1 + 2 + 3.
    assert plots.count() == 1 + 1 + 4 + 2 + 2 + 6 + 7
    assert page.locator(".plot:visible").count() == plots.count()
    for plot in plots.all():
        assert plot.locator("svg.main-svg").count() >= 2
    assert page.locator(HEAT).first.locator(".hm image, .heatmaplayer image").count() >= 1
    assert page.locator(HEAT).first.locator(".textpoint").count() == 8
    assert page.locator('[aria-label^="training loss"] .scatterlayer path.js-line').count() >= 8
    assert page.locator('[aria-label^="validation accuracy"] .scatterlayer path.js-fill').count() >= 4


def test_a_filter_hides_and_shows_tasks_everywhere(show):
    page = show()
    page.get_by_role("button", name="Mano", exact=True).click()
    settle(page)
    assert page.locator("#results-R4-smoke").is_hidden()
    assert page.locator('a[href="#results-R4-smoke"]').first.is_hidden()
    assert page.locator("#results-R3-smoke-verdicts li:visible").count() == 1
    assert set(page.locator("#results-R3-smoke-differences tr:visible td:first-child").all_inner_texts()) == {"Mano"}
    assert set(page.locator("#results-R3-smoke-curves h4:visible").all_inner_texts()) == {"Mano"}
    assert page.locator(HEAT).first.locator(".textpoint").count() == 4
    assert page.locator('[aria-label="forest plot of differences"]').first.locator(".textpoint").count() == 1
    page.get_by_role("button", name="All tasks").click()
    settle(page)
    assert page.locator("#results-R4-smoke").is_visible()
    assert page.locator(HEAT).first.locator(".textpoint").count() == 8


def test_a_cell_opens_the_commands_that_reproduce_it(show):
    page = show()
    click_cell(page, page.locator(HEAT).first, column=1, columns=4, row=0, rows=2)
    panel = page.locator("#panel")
    expect(panel).to_be_visible()
    expect(panel.locator("#panel-title")).to_have_text("NoPE + Canon")
    commands = panel.locator("li code").all_inner_texts()
    assert [command.split(" seed=")[1][0] for command in commands] == ["1", "2", "3"]
    assert all(command.startswith("python src/train.py experiment=fake") for command in commands)
    panel.locator("li .copy").first.click()
    expect(panel.locator("li .copy").first).to_have_text("Copied")
    page.keyboard.press("Escape")
    expect(panel).to_be_hidden()
    # The same from the keyboard, by way of the table.
    page.locator("#results-R3-smoke-scores details.table summary").click()
    page.locator("#results-R3-smoke-scores [data-cell]").nth(6).press("Enter")
    expect(panel.locator("#panel-title")).to_have_text("RoPE")
    expect(panel.locator("#panel-where")).to_have_text("Mano")
    panel.get_by_role("button", name="Close").click()
    expect(panel).to_be_hidden()


def test_the_other_score_is_a_click_away_and_named(show):
    page = show()
    expect(page.locator(HEAT).first).to_be_visible()
    page.get_by_role("button", name="Best over rates").click()
    settle(page)
    expect(page.locator(HEAT).first).to_be_hidden()
    assert page.get_by_text("Best over learning rates (the paper's measure)").first.is_visible()
    best = page.locator('[aria-label="heat map of best scores"]').first
    assert "best of 6" in best.locator(".textpoint").first.text_content()
    click_cell(page, best, column=3, columns=4, row=1, rows=2)
    expect(page.locator("#panel-title")).to_have_text("RoPE + Canon")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Mean over seeds").click()
    settle(page)
    expect(page.locator(HEAT).first).to_be_visible()


def test_variants_can_be_taken_out_of_the_curves(show):
    page = show()
    lines = page.locator("#results-R3-smoke-curves .js-line")
    before = lines.count()
    page.locator('[data-variant="NoPE"]').first.click()
    settle(page)
    assert lines.count() < before
    assert page.locator('[data-variant="NoPE"]').first.get_attribute("aria-pressed") == "false"
    page.locator('[data-variant="NoPE"]').first.click()
    settle(page)
    assert lines.count() == before


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_everything_can_be_read(show, theme, width):
    page = show(theme, width)
    for details in page.locator("details").all():
        details.evaluate("node => node.open = true")
    settle(page)
    assert page.evaluate(UNREADABLE) == []


def test_the_theme_is_changed_and_remembered(show):
    page = show()
    ground = "getComputedStyle(document.body).backgroundColor"
    text = "document.querySelector('.xtick text').style.fill"
    light = page.evaluate(ground), page.evaluate(text)
    page.get_by_role("button", name="Dark", exact=True).click()
    settle(page)
    dark = page.evaluate(ground), page.evaluate(text)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.reload()
    settle(page)
    assert (page.evaluate(ground), page.evaluate(text)) == dark
    assert page.get_by_role("button", name="Dark", exact=True).get_attribute("aria-pressed") == "true"
    page.get_by_role("button", name="Light", exact=True).click()
    settle(page)
    assert (page.evaluate(ground), page.evaluate(text)) == light


@pytest.mark.parametrize(("theme", "width"), [("light", 1440), ("dark", 390)])
def test_nothing_is_wider_than_the_window(show, theme, width):
    page = show(theme, width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    heat = page.locator(HEAT).first
    assert heat.bounding_box()["width"] <= width
    click_cell(page, heat, column=2, columns=4, row=1, rows=2)
    expect(page.locator("#panel-title")).to_have_text("RoPE")
    assert page.locator("#panel").bounding_box()["width"] <= width
    page.keyboard.press("Escape")


def test_without_scripts_verdicts_and_tables_are_there(show):
    page = show(scripts=False)
    assert page.get_by_text("Figures need JavaScript").is_visible()
    assert page.locator(".verdicts li:visible").count() == 5
    assert page.locator("#results-R3-smoke-differences tbody tr:visible").count() == 12
    assert page.locator(".plot:visible").count() == 0
    assert page.locator("button:visible").count() == 0
