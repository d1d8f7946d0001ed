"""Drawings show what the examples say: counted and located artists, no pixels."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PolyCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

import src.datamodules.tasks as tasks
from src.datamodules.tasks import MQAR, Brevo, Capo, Copy, Depo, Lano, Mano, Task
from src.reporting.drawings import DRAWERS, draw, draw_window
from src.reporting.drawings.canvas import DPI, flow, name_width, sheet, word_name
from src.reporting.drawings.ring import NAMED
from src.reporting.drawings.strips import MOST
from src.reporting.drawings.trees import TREE_LEAVES

SMALL_AND_PUBLISHED = [
    Depo(N=3, K=8, mini_vocab=3),
    Depo(N=8, K=2, mini_vocab=8, word_length=(1, 1), compact_ids=True),
    Depo(N=NAMED, K=8),
    Depo(N=225, K=8),
    Depo(N=22, K=16, mini_vocab=4, word_length=(5, 7)),
    Brevo(N=3),
    Brevo(N=12),
    Brevo(N=8, multi_token=True),
    Brevo(N=70),
    Brevo(N=110),
    Brevo(N=50, multi_token=True),
    Mano(L=1),
    Mano(L=16),
    Lano(levels=1),
    Lano(levels=3, terminator="eos"),
    Lano(),
    Lano(grammar="cfg3k"),
    Copy(N=1),
    Copy(N=30),
    MQAR(num_pairs=1, length=4, vocabulary=8),
    MQAR(num_pairs=3, length=24, vocabulary=64),
    MQAR(num_pairs=64, length=512),
    Capo(num_people=20),
]


def drawn(task: Task, index: int = 0) -> tuple[np.ndarray, Figure]:
    tokens, _ = task.example(42, "test", index)
    figure = draw(task, tokens, "an example; " + repr(task))
    assert figure is not None
    return tokens, figure


def find(figure: Figure, gid: str) -> list:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def segments(figure: Figure, gid: str) -> list:
    return [segment for artist in find(figure, gid) for segment in artist.get_segments()]


def count(figure: Figure, gid: str) -> int:
    sizes = {LineCollection: lambda a: len(a.get_segments()), PolyCollection: lambda a: len(a.get_paths())}
    return sum(sizes.get(type(artist), lambda a: 1)(artist) for artist in find(figure, gid))


def extents(figure: Figure, texts: list[Text]) -> list:
    """Pixel boxes of texts, the boxes drawn around them included."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    figure.canvas.draw()
    patches = [text.get_bbox_patch() for text in texts]
    return [(p or t).get_window_extent(renderer) for p, t in zip(patches, texts, strict=True)]


def of(kind: type) -> list[Task]:
    return [task for task in SMALL_AND_PUBLISHED if isinstance(task, kind)]


def test_every_task_has_a_drawing():
    found = {
        value for name in tasks.__all__ if isinstance(value := getattr(tasks, name), type) and issubclass(value, Task)
    }
    assert set(DRAWERS) == found - {Task}


def test_an_unknown_task_has_none():
    assert draw(object(), np.zeros(3, dtype=np.int64)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("task", SMALL_AND_PUBLISHED, ids=repr)
def test_all_text_is_on_the_sheet(task):
    _, figure = drawn(task)
    texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
    sheet = figure.bbox
    for text, box in zip(texts, extents(figure, texts), strict=True):
        assert sheet.x0 <= box.x0 + 1, text
        assert box.x1 <= sheet.x1 + 1, text
        assert sheet.y0 <= box.y0 + 1, text
        assert box.y1 <= sheet.y1 + 1, text


@pytest.mark.parametrize("task", [*of(Brevo), *of(Mano), *of(Lano)], ids=repr)
def test_nodes_do_not_overlap(task):
    _, figure = drawn(task)
    nodes = [
        artist for gid in ("node", "idle node", "value") for artist in find(figure, gid) if isinstance(artist, Text)
    ]
    boxes = extents(figure, nodes)
    for (a, box), (b, other) in combinations(zip(nodes, boxes, strict=True), 2):
        assert not box.padded(-1).overlaps(other.padded(-1)), (a, b)


# ---- task by task ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", of(Depo), ids=repr)
def test_depo_has_every_word_edge_and_question(task):
    tokens, figure = drawn(task)
    edges, questions = task.parse(tokens)
    assert count(figure, "node") == len(edges)
    assert count(figure, "edge") == len(edges)
    assert count(figure, "question") == len(questions)
    # Words as they stand on the ring, and arcs that end where their answers stand.
    dots = np.array([dot.center for dot in find(figure, "node")])
    names = [text.get_text() for text in figure.findobj(Text)]
    successor, cycle = dict(edges), [edges[0][0]]
    for _ in edges[1:]:
        cycle.append(successor[cycle[-1]])
    assert {word_name(word) for word in cycle} <= set(names) or len(cycle) > NAMED
    tracks = iter(segments(figure, "question"))
    for (k, asked, answer), (start, end) in zip(
        questions, np.reshape(segments(figure, "leader"), (-1, 2, 2, 2)), strict=True
    ):
        near = [int(np.argmin(np.linalg.norm(dots - leader[0], axis=1))) for leader in (start, end)]
        assert [cycle[i] for i in near] == [asked, answer]
        # Seen from the middle, it turns by k steps.
        x, y = (np.asarray(next(tracks)) - dots.mean(axis=0)).T
        assert np.unwrap(np.arctan2(y, x))[[0, -1]] @ [-1, 1] == pytest.approx(2 * np.pi * k / len(edges))
        assert f"{k} step{'s' if k > 1 else ''} from {word_name(asked)}: {word_name(answer)}" in names


def test_depo_tracks_keep_apart():
    """Also where questions go around several times."""
    for task in (Depo(N=3, K=8, mini_vocab=3), Depo(N=5, K=16, mini_vocab=8), Depo(N=12, K=8, mini_vocab=30)):
        for index in range(3):
            tracks = [np.asarray(track) for track in segments(drawn(task, index)[1], "question")]
            for a, b in combinations(tracks, 2):
                assert np.linalg.norm(a[:, None] - b[None], axis=-1).min() > 0.04, (task, index)


@pytest.mark.parametrize("task", of(Brevo), ids=repr)
def test_brevo_edges_lead_from_parents_down_to_children(task):
    tokens, figure = drawn(task)
    graph = task.parse(tokens)
    required = graph.required()
    place = {}
    for gid, group in (("node", required), ("idle node", {n for edge in graph.edges for n in edge} - required)):
        assert Counter(text.get_text() for text in find(figure, gid)) == Counter(map(word_name, group))
        place |= {text.get_position(): text.get_text() for text in find(figure, gid)}
    found = Counter()
    for gid in ("edge", "idle edge"):
        for path in segments(figure, gid):
            assert (np.diff(path[:, 1]) >= 0).all()
            at = [min(place, key=lambda xy: np.hypot(*(np.array(xy) - end))) for end in (path[0], path[-1])]
            np.testing.assert_allclose(at, [path[0], path[-1]], atol=1e-6)
            found[place[at[0]], place[at[1]], gid] += 1
    assert found == Counter(
        (word_name(a), word_name(b), "edge" if b in required else "idle edge") for a, b in graph.edges
    )
    turns = {text.get_text(): text.get_position() for text in find(figure, "turn")}
    assert list(turns) == [str(i) for i in range(1, len(required) + 1)]
    for turn, node in enumerate(graph.answer, start=1):  # each beside its own node
        nearest = min(place, key=lambda xy: np.hypot(*(np.array(xy) - turns[str(turn)])))
        assert place[nearest] == word_name(node)


@pytest.mark.parametrize("task", [Brevo(N=30), Brevo(N=110)], ids=repr)
def test_brevo_edges_do_not_pass_behind_what_is_needed(task):
    _, figure = drawn(task)
    nodes = find(figure, "node")
    boxes = extents(figure, nodes)
    to_pixels = figure.axes[0].transData
    for path in segments(figure, "edge"):
        pixels = to_pixels.transform(path)
        hit = {
            text.get_text()
            for text, box in zip(nodes, boxes, strict=True)
            if any(box.padded(-4).contains(*point) for point in pixels)
        }
        assert len(hit) <= 2, hit  # its own ends


@pytest.mark.parametrize("task", of(Mano), ids=repr)
def test_mano_shows_every_number_and_value(task):
    tokens, figure = drawn(task)
    tree, answer = task.parse(tokens)
    numbers, values = [], []

    def walk(node) -> None:
        (numbers if isinstance(node, int) else values).append(str(task.evaluate(node)))
        for child in [] if isinstance(node, int) else node[1:]:
            walk(child)

    walk(tree)
    assert Counter(text.get_text() for text in find(figure, "value")) == Counter(values)
    labels = [text.get_text() for text in find(figure, "node")]
    assert Counter(label for label in labels if label.isdigit()) == Counter(numbers)
    assert len(labels) == 2 * task.L + 1
    assert count(figure, "edge") == 2 * task.L
    root = min(find(figure, "value"), key=lambda text: text.get_position()[1])
    assert root.get_text() == str(answer)


@pytest.mark.parametrize("task", of(Lano), ids=repr)
def test_lano_shows_every_span(task):
    tokens, figure = drawn(task)
    layers = task.parse(tokens)
    assert count(figure, "node") == sum(map(len, layers))
    if len(layers[-1]) <= TREE_LEAVES:
        assert count(figure, "edge") == count(figure, "node") - 1
        words = Counter(text.get_text() for text in find(figure, "node"))
        assert words == Counter(str(symbol) for layer in layers for symbol, _, _ in layer)
    else:
        bars = [path.get_extents().bounds for artist in find(figure, "node") for path in artist.get_paths()]
        spans = np.array([end - start for layer in layers for _, start, end in layer])
        np.testing.assert_allclose([bar[2] for bar in bars], spans / len(layers[-1]) * bars[0][2])


@pytest.mark.parametrize("task", [*of(Copy), Copy(N=MOST + 5)], ids=repr)
def test_copy_joins_every_token_with_its_twin(task):
    _, figure = drawn(task)
    shown = min(task.size, MOST)
    assert count(figure, "sequence") == count(figure, "copy") == count(figure, "link") == shown
    assert any(f"first {MOST:,}" in text.get_text() for text in figure.findobj(Text)) == (shown < task.size)


@pytest.mark.parametrize("task", of(MQAR), ids=repr)
def test_mqar_has_an_arc_for_every_question(task):
    tokens, figure = drawn(task)
    pairs, questions = task.parse(tokens)
    assert count(figure, "token") == len(tokens)
    cell = find(figure, "token")[0].get_paths()[0].get_extents().width
    found = sorted(
        (round(path[0, 0] / cell) - 1, round(path[-1, 0] / cell) - 1) for path in segments(figure, "question")
    )
    keys = list(pairs)
    assert found == sorted((2 * keys.index(key), t) for t, key, _ in questions)


def test_capo_writes_the_whole_text_and_marks_name_and_facts():
    task = Capo(num_people=20)
    for index in range(4):
        tokens, figure = drawn(task, index)
        person = task.person(42, int(task.people(42, "test", index, 1)[0]))
        words = find(figure, "word")
        assert "".join(text.get_text() for text in words) == task.decode(tokens[1:]).replace(" ", "")
        # What lies in the boxes, in reading order, is the name and the values.
        inside = Counter()
        for box in find(figure, "value"):
            left, top, width, height = box.get_x(), box.get_y(), box.get_width(), box.get_height()
            for text in words:
                x, y = text.get_position()
                if left - 1e-6 <= x < left + width and top < y < top + height:
                    inside[text.get_text()] += 1
        record = " ".join((person.full_name, *person.values)).replace(",", " ,").replace("'s", " 's").replace(".", " .")
        assert inside == Counter(record.split())
        captions = {text.get_text() for text in figure.findobj(Text)}
        assert {"name", "birthday", "birth city", "university", "field", "employer city", "employer"} <= captions


@pytest.mark.parametrize("task", [Depo(N=12), Copy(N=10), Capo(num_people=50)], ids=repr)
def test_a_window_has_a_cell_for_every_token_and_a_mark_for_every_example(task):
    windows = task.windows(0, "train", 3, 1, 300)
    figure = draw_window(windows)
    assert count(figure, "token") == 300
    assert count(figure, "start") == len(np.unique(windows.segments))


# ---- tools -----------------------------------------------------------------------------------------------------------


def test_flow_goes_through_its_stops_and_ends_vertically():
    stops = [(0.0, 0.0), (2.0, 1.0), (1.0, 2.0), (5.0, 3.0)]
    path = flow(stops)
    assert {tuple(point) for point in np.round(path, 9).tolist()} >= set(stops)
    assert abs(path[1, 0] - path[0, 0]) < 0.5 * (path[1, 1] - path[0, 1])
    assert abs(path[-1, 0] - path[-2, 0]) < 0.5 * (path[-1, 1] - path[-2, 1])


def test_name_width_is_what_is_drawn():
    figure, _ = sheet(4, 4, "", "")
    for name in ("7", "123", "1.3.2.4.7"):
        (box,) = extents(figure, [figure.text(0.5, 0.5, name, fontsize=30)])
        assert name_width(name, 30) * DPI == pytest.approx(box.width, rel=0.12)
