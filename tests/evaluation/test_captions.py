"""Metrics of captions, against numbers computed by hand."""

from __future__ import annotations

import math

import pytest

from megadiff.config.errors import UserError
from megadiff.evaluation.captions import caption_metrics, cider, distinct, length_distance, self_bleu, words


def test_words_are_lower_case_without_punctuation():
    assert words("A Dog's ball, twice: 2-3.") == ["a", "dog's", "ball", "twice", "2", "3"]


def test_cider_of_equal_captions_is_ten_where_every_order_has_words_of_its_own():
    captions = ["one two three four", "five six seven eight"]
    assert cider(captions, [[text] for text in captions]) == pytest.approx(10)
    assert cider(captions[::-1], [[text] for text in captions]) == 0


def test_cider_equals_the_sum_by_hand():
    # Documents: {a, b} and {a, c}; of two, so a word in one weighs log 2 and "a", which is in both, log 1 = 0.
    references = [["a b"], ["a c"]]
    # "b b": unigram vector (b: 2 log 2), clipped to (b: log 2) . (b: log 2), norms 2 log 2 and log 2: 1/2; no common bigram.
    # "a c": order 1 (c: log 2) and order 2 (a c: log 2) are equal: 1 each. Both have the reference's length.
    assert cider(["b b", "a c"], references) == pytest.approx(10 * (0.5 / 4 + 2 / 4) / 2)
    # Two words longer than the reference: a factor exp(-2^2 / (2 6^2)); (b: 2 log 2, x: log 2, y: ...) against (b: log 2).
    cosine = 1 / math.sqrt(1 + 1 + 1)
    assert cider(["b x y", "a c"], [["b"], ["a c"]]) == pytest.approx(10 * (math.exp(-4 / 72) * cosine / 4 + 2 / 4) / 2)


def test_cider_takes_the_mean_over_the_references_of_a_caption():
    assert cider(["b x", "c d"], [["b x", "e f"], ["c d", "c d"]]) == pytest.approx(10 * (2 / 4 / 2 + 2 / 4) / 2)


def test_distinct_counts_different_runs_over_all_captions():
    assert distinct(["a b a", "a b"], 1) == pytest.approx(2 / 5)
    assert distinct(["a b a", "a b"], 2) == pytest.approx(2 / 3)
    assert distinct(["a"], 2) == 0


def test_self_bleu_is_100_for_equal_captions_and_low_for_different_ones():
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(100)
    assert self_bleu(["one two three four five", "six seven eight nine ten", "a b c d e"]) < 10


def test_length_distance_is_how_many_words_a_caption_must_change_by():
    assert length_distance([3, 3], [3, 3]) == 0
    assert length_distance([3, 3], [5, 5]) == 2
    assert length_distance([2, 6], [4, 4]) == 2


def test_captions_equal_to_one_of_their_references_score_highest_and_say_how_they_were_scored():
    texts = ["a red heart on white", "a cat with a hat on", "the flag of a far land"]
    references = [[text, "something else entirely here"] for text in texts]
    found = {
        metric.name: metric
        for metric in caption_metrics(texts, [own[:: 1 if n else -1] for n, own in enumerate(references)], {"seed": 3})
    }
    assert found["BLEU"].value == pytest.approx(100)
    assert found["chrF"].value == pytest.approx(100)
    assert found["BLEU"].depends["signature"].startswith("nrefs:2|case:lc|")
    assert found["BLEU"].depends["seed"] == 3
    assert found["words a caption"].value == pytest.approx(17 / 3)
    uneven = caption_metrics(texts, [[texts[0]], references[1], references[2]], {})
    assert {metric.name: metric.value for metric in uneven}["BLEU"] == pytest.approx(100)
    with pytest.raises(UserError, match="there are 1 captions"):
        caption_metrics(texts[:1], references[:1], {})
