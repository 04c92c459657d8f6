"""The decisive words' places are those of the words that the rule names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noisefit.method.decisive import decisive_parts, decisive_spans, holds, located_words, words

TEXTS = st.text(st.sampled_from("ab Bé.,-'’s+#12½ΣİǅﬁŁ日本の\u0301\u0327\n\u00a0\u2212한ㅏ€😀\u093e"), max_size=24)


def shown(prompt, response, truth=""):
    return [response[start:end] for start, end in decisive_spans(prompt, response, truth)]


@pytest.mark.parametrize(
    ("prompt", "response", "truth", "found"),
    [
        ("What is the capital of Portugal?", "The capital of Portugal is Lisbon.", "", ["Lisbon"]),
        ("What is the capital of Panama?", "Panama's capital is Panama City.", "", ["Panama City"]),
        ("Who composed it?", "Antonín Dvořák composed it.", "", ["Antonín Dvořák"]),
        ("Who composed it?", "Antoni\u0301n Dvor\u030ca\u0301k composed it.", "", ["Antoni\u0301n Dvor\u030ca\u0301k"]),
        ("When was it?", "It was in May 1,969, in a way.", "", ["May 1,969"]),
        ("Who is B?", "B is Smith's friend.", "", ["Smith's friend"]),
        ("Who founded X?", "X was founded by Ada and later by Bo.", "", ["Ada and later", "Bo"]),
        ("Where?", "In Lisbon and in Porto.", "Porto", ["Porto"]),
        ("Where?", "In Lisbon.", "Porto", ["Lisbon"]),  # not in the response: the rule decides
        ("Which sign is it?", "It is + .", "", ["+"]),
        ("日本の首都は?", "東京", "", ["東京"]),
        ("What is it?", "Is it?", "", ["Is it"]),  # nothing else is found
        ("How cold is it?", "It is \u22125 there", "", ["\u22125"]),
    ],
)
def test_the_places_of_what_decides(prompt, response, truth, found):
    assert shown(prompt, response, truth) == found


@given(TEXTS)
def test_located_words_are_the_words(text):
    located = located_words(text)
    assert [word for word, _ in located] == words(text)
    ends = [0, *(place for _, span in located for place in span)]
    assert all(0 <= start < end <= len(text) for _, (start, end) in located) and max(ends) <= len(text)


@given(TEXTS, TEXTS)
def test_the_spans_hold_the_parts(prompt, response):
    spans = decisive_spans(prompt, response)
    assert spans and all(0 <= start <= end <= len(response) for start, end in spans)
    parts = decisive_parts(prompt, response)
    if holds(response, parts) and words(response) and response.isascii() and "'" not in response:
        assert [words(response[a:b]) or [response[a:b]] for a, b in spans] == [part.split() for part in parts]
