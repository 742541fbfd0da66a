"""Text is text, whatever it says."""

import json
from html.parser import HTMLParser

import pytest

from kdcmae_fast.report.markup import Markup, data_block, element, join, table, text

HOSTILE = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x", "a & b &amp;",
    "</script><b>", "日本語 🎧 \u202eevil", "\ud800 half", "nul\x00 and bell\x07",
]  # fmt: skip


def texts_of(markup: str) -> tuple[list[str], list[str]]:
    """(tags, texts) as a parser sees them."""
    tags: list[str] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.append(tag)
            texts.extend(value for _, value in attrs if value)

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(markup)
    return tags, texts


@pytest.mark.parametrize("said", HOSTILE)
def test_text_and_attributes_come_back_as_they_were(said):
    markup = element("p", said, title=said)
    markup.encode("utf-8")
    tags, texts = texts_of(markup)
    assert tags == ["p"]
    printable = "".join("\ufffd" if c in "\ud800\x00\x07" else c for c in said)
    assert texts == [printable, printable]


def test_markup_is_not_escaped_again():
    inner = element("b", "<")
    assert inner == "<b>&lt;</b>"
    assert element("p", inner, [inner, None, 3]) == "<p><b>&lt;</b><b>&lt;</b>3</p>"
    assert isinstance(join([inner, "x"]), Markup) and text(inner) is inner


def test_attributes():
    got = element("img", class_="a", aria_label="b", hidden=True, alt="", title=None, open=False)
    assert got == '<img class="a" aria-label="b" hidden alt="">'


def test_a_data_block_cannot_be_left():
    value = {"name": "</script><script>alert(1)</script><!--", "points": [[1, 2.5]]}
    block = data_block(value)
    inside = block.removeprefix('<script type="application/json">').removesuffix("</script>")
    assert "<" not in inside and ">" not in inside
    assert json.loads(inside) == value


def test_a_table_sets_words_left_and_numbers_right():
    rows = [["a", "dog", "1.5"], ["b", "–", "−2"]]
    markup = table(["name", "class", "count"], rows, caption="both")
    assert '<th scope="col" class="words">class</th><th scope="col">count</th>' in markup
    assert '<td class="words">dog</td><td>1.5</td>' in markup
    assert '<th scope="row">a</th>' in markup and "<caption>both</caption>" in markup
