"""The grammar of prompts, held to what webui and ComfyUI were seen to read, and to random strings."""

import random
from pathlib import Path

import pytest

from diffgraft.errors import DiffgraftError
from diffgraft.generation.grammar.attention import Style, read_weights, unclosed_brackets
from diffgraft.generation.grammar.choices import draw_choices
from diffgraft.generation.grammar.composition import split_parts
from diffgraft.generation.grammar.notes import notes_on, place_of, remarks_on
from diffgraft.generation.grammar.schedule import schedule_of
from diffgraft.generation.grammar.tags import AdapterTag, Point, split_tags

# what webui's parser gave, of the version in Forge
WEBUI = {
    "a (b BREAK c:1.2) d": [("a ", 1.0), ("b", 1.2), ("BREAK", -1.2), ("c", 1.2), (" d", 1.0)],
    "a BREAK b": [("a", 1.0), ("BREAK", -1), ("b", 1.0)],
    "((a:1.2))": [("a", 1.32)],
    "[[a:1.2]]": [("a:1.2", 0.8264462809917354)],
    "(a:1.2": [("a:1.2", 1.1)],
    "a\\b": [("ab", 1.0)],
    "(a:1,2)": [("a:1,2", 1.1)],
    "(a: 1.2 )": [("a", 1.2)],
    "(a:-0.5)": [("a", -0.5)],
    "a (b:1.2) AND c :0.5": [("a ", 1.0), ("b", 1.2), (" AND c :0.5", 1.0)],
    "(a::1.2)": [("a:", 1.2)],
    "(a:1.2:1.3)": [("a:1.2", 1.3)],
    # from the meaning of the brackets
    "": [("", 1.0)],
    "\\(a\\) \\[b\\] \\\\": [("(a) [b] \\", 1.0)],
    "(a [b) c]": [("a ", 1.1), ("b", 1.1 * (1 / 1.1)), (" c", 1 / 1.1)],
    "a) b]": [("a) b]", 1.0)],
    "(a:1.2.3)": [("a:1.2.3)", 1.1)],
    "a:1.2) b": [("a:1.2) b", 1.0)],
}
COMFYUI = {
    "((a:1.2))": [("a", 1.2)],
    "(a (b:1.2):1.5)": [("a ", 1.5), ("b", 1.2)],
    "((a))": [("a", 1.21)],
    "[a]": [("[a]", 1.0)],
    "(a:1.2": [("(a:1.2", 1.0)],
    "a \\(b\\)": [("a (b)", 1.0)],
    "(a:b:1.3)": [("a:b", 1.3)],
    "a BREAK b": [("a BREAK b", 1.0)],
    "a) b (c": [("a) b (c", 1.0)],
    "": [("", 1.0)],
    "()": [("", 1.0)],
    "(:1.2)": [(":1.2", 1.1)],
}


@pytest.mark.parametrize(("style", "cases"), [("webui", WEBUI), ("comfyui", COMFYUI)])
def test_weights(style: Style, cases: dict[str, list[tuple[str, float]]]) -> None:
    for text, wanted in cases.items():
        found = [tuple(piece) for piece in read_weights(text, style)]
        assert [word for word, _ in found] == [word for word, _ in wanted], text
        assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted], rel=1e-12), text


SCHEDULES = {
    "[a:b:0.5]": [(5, "a"), (10, "b")],
    "[a:b:1]": [(1, "a"), (10, "b")],
    "[a:b:1.0]": [(10, "a")],
    "[a:b:0]": [(10, "b")],
    "[a:b:11]": [(10, "a")],
    "[a|b|c] x": [(step, "abc"[(step - 1) % 3] + " x") for step in range(1, 11)],
    "[a:0.5]": [(5, ""), (10, "a")],
    "[a::5]": [(5, "a"), (10, "")],
    "([a:b:0.5]:1.3)": [(5, "(a:1.3)"), (10, "(b:1.3)")],
    "[a:b:c:0.5]": [(10, "[a:b:c:0.5]")],
    "[(a:1.2):(b:0.8):.3]": [(3, "(a:1.2)"), (10, "(b:0.8)")],
    "<lora:x:[0.2:0.8:0.5]>": [(5, "<lora:x:0.2>"), (10, "<lora:x:0.8>")],
    "test": [(10, "test")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[fe|]male": [(step, ("female", "male")[(step - 1) % 2]) for step in range(1, 11)],
    "[fe|||]male": [(step, "male" if (step - 1) % 4 else "female") for step in range(1, 11)],
    "a | b [c:5]": [(10, "a | b [c:5]")],
    "a [b:5] \\": [(10, "a [b:5] \\")],
    "a \\[b:5\\]": [(10, "a \\[b:5\\]")],
    "[a:b:1e0]": [(1, "a"), (10, "b")],
    "[a:b:9e99]": [(10, "a")],
}


@pytest.mark.parametrize(("text", "wanted"), SCHEDULES.items())
def test_changes_between_steps(text: str, wanted: list[tuple[int, str]]) -> None:
    assert [tuple(stage) for stage in schedule_of(text, 10)] == wanted


def test_changes_in_the_second_pass_of_a_hires_fix() -> None:
    assert [tuple(stage) for stage in schedule_of("[a:b:0.5]", 10, 10)] == [(10, "b")]
    assert [tuple(stage) for stage in schedule_of("[a:b:1.5]", 10, 10)] == [(5, "a"), (10, "b")]
    assert [tuple(stage) for stage in schedule_of("[a:b:13]", 8, 10)] == [(3, "a"), (8, "b")]


def test_parts() -> None:
    assert [tuple(part) for part in split_parts("a cat :1.2 AND a dog AND x(y:1.1):-0.5")] == [
        ("a cat", 1.2),
        (" a dog", 1.0),
        (" x(y:1.1)", -0.5),
    ]
    assert [tuple(part) for part in split_parts("BRAND and AND ")] == [("BRAND and", 1.0), ("", 1.0)]
    assert [tuple(part) for part in split_parts("")] == [("", 1.0)]
    assert [tuple(part) for part in split_parts("a :.5")] == [("a", 0.5)]


ATOMS = (*"abcdefgh", " ", ",", "(", ")", "[", "]", ":", "|", "\\", "0.5", "3", "1.0", " AND ", " BREAK ", "[c:d:2]")


@pytest.mark.parametrize("style", ["webui", "comfyui"])
def test_no_random_string_crashes_or_loses_a_letter_silently(style: Style) -> None:
    """Each letter is drawn in some step, or a note tells that it is not."""
    dice = random.Random(3)
    for _ in range(10_000):
        text = "".join(dice.choice(ATOMS) for _ in range(dice.randint(0, 14)))
        notes = [*notes_on(text, 10, style)]
        said = ""
        for part in split_parts(text) if style == "webui" else [text]:
            stages = schedule_of(part.text, 10) if style == "webui" else [(10, text)]
            assert stages[-1][0] == 10
            assert [end for end, _ in stages] == sorted({end for end, _ in stages})
            said += "".join(piece.text for _, stage in stages for piece in read_weights(stage, style))
        missing = {letter for letter in text if letter in "abcdefgh"} - set(said)
        assert not missing or any("never draws" in note for note in notes), text


def test_deep_nesting_is_no_trouble() -> None:
    for text in ("(" * 3000 + "a" + ")" * 3000, "[" * 3000 + "a", "[a:" * 500 + "b" + ":3]" * 500, "\\" * 3001):
        assert schedule_of(text, 10)
        assert read_weights(text)
        assert read_weights(text, "comfyui")
        [*notes_on(text, 10)]


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("[a:b:c:0.5]", r"\[a:b:c:0.5\] is drawn as text"),
        ("(a BREAK b:1.2)", "BREAK in brackets is drawn as a word"),
        ("(a:1,2)", "The number of 'a:1,2' is drawn as text"),
        ("(a red dog", "never closed"),
        ("a\\b", "backslash of .* is dropped"),
        ("a | [b:5]", r"\[b:5\] is drawn as text, because the prompt has a \| outside"),
        ("[dog:1.2]", "never draws 'dog' in 10 steps; for a weight, use round brackets"),
        ("[dog:cat:0]", "never draws 'dog'"),
    ],
)
def test_what_is_not_meant_is_told(text: str, note: str) -> None:
    (found,) = notes_on(text, 10)
    with pytest.raises(AssertionError, match=note):
        raise AssertionError(found)


def test_what_is_meant_is_not_told() -> None:
    for text in ("a (red dog:1.2), [cat:dog:0.5] [a|b] BREAK \\(c\\) AND d :0.5", "a dog: red, 1:2", "(a:b)"):
        assert [*notes_on(text, 10)] == []
    assert [*notes_on("(a:1.2) [b]", 10, "comfyui")] == []
    assert len([*notes_on("[a:b:3] AND c BREAK", 10, "comfyui")]) == 3


def test_unclosed_brackets_are_found() -> None:
    places = [unclosed_brackets(text) for text in ("(a", "((a:1.2)", "[(a]", "a)", "\\(a", "(a)")]
    assert places == [[0], [0], [1], [], [], []]


@pytest.mark.parametrize(
    ("text", "excerpt"),
    [
        ("a cat [a:b:c:0.5]", "[a:b:c:0.5]"),
        ("x (a BREAK b:1.2)", "BREAK"),
        ("a (b:1.2) (a:1,2)", "a:1,2"),
        ("a (red dog in snow", "(red dog in snow"),
        ("red a\\b dog", "\\b dog"),
        ("a [dog:1.2]", "dog"),
    ],
)
def test_a_remark_tells_where(text: str, excerpt: str) -> None:
    (remark,) = remarks_on(text, 10)
    start, end = place_of(remark.excerpt, text)
    assert text[start:end] == excerpt
    assert place_of("not there", text) == (0, len(text))


def test_tags() -> None:
    half = (Point(0.5, 0.0, False),)
    text, tags = split_tags("a <lora:dog:0.5> b <hypernet:x> <lyco:y:0.5:1>")
    assert text == "a  b  "
    assert [(tag.kind, tag.name) for tag in tags] == [("lora", "dog"), ("hypernet", "x"), ("lora", "y")]
    assert tags[0] == AdapterTag("lora", "dog", half, half)
    assert (tags[2].text_encoder, tags[2].denoiser) == (half, (Point(1.0, 0.0, False),))
    (tag,) = split_tags("<lora:dog:te=0.5:unet=0@0,1@0.5:start=0.25:stop=12:lbw=M00>")[1]
    assert (tag.text_encoder, tag.denoiser) == (half, (Point(0.0, 0.0, False), Point(1.0, 0.5, False)))
    assert (tag.start, tag.end) == (Point(1.0, 0.25, False), Point(1.0, 12.0, True))
    assert {block for block, factor in tag.blocks.items() if factor} == {"BASE", "M00"}
    (tag,) = split_tags("<lora:dog:1:1:lbw=" + ",".join("0.25" for _ in range(17)) + ":out=0>")[1]
    assert (tag.blocks["M00"], tag.blocks["IN04"], tag.blocks["OUT03"]) == (0.25, 0.25, 0.0)


@pytest.mark.parametrize(
    ("tag", "answer"),
    [
        ("<loar:dog:1>", "unknown kind of adapter"),
        ("<lora:dog:much>", "'much' in <lora:dog:much> is not a number"),
        ("<lora:dog:nan>", "is not a number"),
        ("<lora:dog:1:x=2>", "unknown setting x"),
        ("<lora:dog:1:1:dyn=4>", "unknown setting dyn"),
        ("<lora:dog:1:1:4>", "has 3 strengths: there are two"),
        ("<lora:dog:1:start=1.5>", "a share above 1"),
        ("<lora:dog:1:start=-1>", "is none"),
        ("<lora:dog:0@0.5,1@3>", "mix shares and numbers of steps"),
        ("<lora:dog:lbw=1,2>", "must be a block such as M00"),
        ("<lora:dog:in=x>", "is not a number"),
    ],
)
def test_tags_that_cannot_be_read(tag: str, answer: str) -> None:
    with pytest.raises(DiffgraftError, match=answer):
        split_tags(f"a dog {tag}")


def test_choices_are_a_function_of_the_seed(tmp_path: Path) -> None:
    (tmp_path / "colours").mkdir()
    (tmp_path / "colours" / "warm.txt").write_text("# a comment\nred\n\n{orange|amber}\n", "utf-8")
    prompt = "a {big|small|{very |}tiny} __colours/warm__ dog, {2$$ and $$x|y|z}, \\{kept\\}"
    drawn = [draw_choices(prompt, seed, tmp_path) for seed in range(60)]
    assert drawn == [draw_choices(prompt, seed, tmp_path) for seed in range(60)]
    assert {text.split("dog")[0].split()[-1] for text in drawn} == {"red", "orange", "amber"}
    sizes = {text.split(" ")[1] for text in drawn}
    assert sizes == {"big", "small", "very", "tiny"}
    assert all(text.endswith("{kept}") and text.split(", ")[1].count(" and ") == 1 for text in drawn)
    counts = [draw_choices("{0.9::a|0.1::b}", seed) for seed in range(400)].count("a")
    assert 330 < counts < 390
    assert draw_choices("__kept__", 1) == "__kept__"
    assert {len(draw_choices("{1-2$$a|b|c}", seed).split(", ")) for seed in range(40)} == {1, 2}


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("__colour__", r"no wildcard __colour__ in .*colours"),
        ("__../secret__", "no wildcard"),
        ("__circle__", "still has choices or wildcards"),
        ("__empty__", "is empty"),
        ("{0::a|0::b}", "no option that can be drawn"),
    ],
)
def test_choices_that_cannot_be_drawn(prompt: str, answer: str, tmp_path: Path) -> None:
    lists = tmp_path / "lists"
    lists.mkdir()
    (tmp_path / "secret.txt").write_text("x", "utf-8")
    (lists / "colours.txt").write_text("red", "utf-8")
    (lists / "circle.txt").write_text("a __circle__", "utf-8")
    (lists / "empty.txt").write_text("# nothing\n", "utf-8")
    with pytest.raises(DiffgraftError, match=answer):
        draw_choices(prompt, 1, lists)
