"""One word in every room: letters keep their marks, and the form in which a text is written does not matter."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedsmith.core.words import folded, letters, runs, words
from embedsmith.curate.rules import token_shingles, units
from embedsmith.mining import Bm25Search
from embedsmith.mining.selection import loose_id

SPACED = {
    "hindi": "हिन्दी में खोज",
    "bengali": "বাংলা ভাষা",
    "tamil": "தமிழ் மொழி",
    "arabic with vowels": "كِتَابٌ جَدِيدٌ",
    "hebrew with points": "שָׁלוֹם עוֹלָם",
    "korean": "배포는 도커를",
    "vietnamese": "tiếng việt",
    "french": "déploiement naïve",
    "persian with a joiner": "می\u200cخواهم خانه",
    "english": "late interaction v2",
}


@pytest.mark.parametrize("text", SPACED.values(), ids=SPACED)
@pytest.mark.parametrize("form", ["NFC", "NFD", "NFKC", "NFKD"])
def test_words_between_spaces_stay_whole_in_every_form_and_every_room(text, form):
    given_ = unicodedata.normalize(form, text)
    expected = folded(text).split()
    assert words(given_) == expected
    assert Bm25Search().words(given_) == Bm25Search(tokens="words").words(given_) == expected
    assert units(given_) == len(expected)
    assert token_shingles(given_, 1000) == {" ".join(expected)}
    assert loose_id(given_) == loose_id(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("测试部署，v2", ["测", "试", "部", "署", "v2"]),
        ("二〇二四年", ["二", "〇", "二", "四", "年"]),
        ("テストｱ", ["テ", "ス", "ト", "ア"]),
        ("ค้นหา", ["ค้", "น", "ห", "า"]),
        ("state-of-the-art C++ node.js a_b", ["state", "of", "the", "art", "c", "node", "js", "a_b"]),
        ("Ｆｕｌｌ　ｗｉｄｔｈ", ["full", "width"]),
        ("co\u00adoperate\ufeff", ["cooperate"]),
        ("\u0301 ? ...", []),
    ],
)
def test_letters_and_words(text, expected):
    assert words(text) == expected


def test_vowel_signs_tell_texts_apart():
    assert loose_id("कि") != loose_id("की")
    assert loose_id("snake_case") == loose_id("snake case")


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=20))
def test_any_text_in_any_form(text):
    """Nothing of a letter or digit is lost, and canonically equal texts have equal words."""
    assert words(unicodedata.normalize("NFC", text)) == words(unicodedata.normalize("NFD", text)) == words(text)
    kept = "".join(words(text))
    assert [one for one in kept if one.isalnum()] == [one for one in folded(text) if one.isalnum()]
    assert all("".join(letters(run)) == run for run, _ in runs(text))


def test_words_of_ascii_are_what_they_are_beside_other_letters():
    for code in range(128):
        text = f"a{chr(code)}b {chr(code)}"
        assert list(runs(f"{text} é"))[:-1] == list(runs(text)), repr(text)
        assert folded(f"{text} é") == f"{folded(text)} é"
