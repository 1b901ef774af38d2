"""Responses token by token are those of the engine, whatever else is answered beside them."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from miepo.errors import UserError
from miepo.policy import GatedConditioning, Policy, PromptConditioning
from miepo.rollout import TransformersEngine
from miepo.rollout.fused_decoder import FusedDecoder
from miepo.seeding import prompt_seeds
from miepo.text import cut_at
from miepo.trained.plain_decoder import PlainDecoder
from miepo.trained.streaming import Chunk, ContinuousDecoder, GenerationRequest, ResponseText, choose, stream
from tests.helpers.tiny import randomise_adapter, tiny_policy, tiny_tokenizer

PROMPTS = ["the garden", "rain comes in spring and people like it", "food"]
W = torch.tensor([[0.2, 0.8], [1.0, 0.0], [0.5, 0.5]])


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    built = tiny_policy(tiny_model, [GatedConditioning(), PromptConditioning()], temperature=0.8)
    return randomise_adapter(built).eval()


def questions(policy: Policy, **changes) -> list[GenerationRequest]:
    seeds = prompt_seeds(7, len(PROMPTS))
    return [
        GenerationRequest(
            policy.template.encode(prompt, policy.preference_text(w.tolist())), w,
            **{"max_new_tokens": 12, "temperature": policy.temperature, "seed": seed} | changes,
        )
        for prompt, w, seed in zip(PROMPTS, W, seeds, strict=True)
    ]  # fmt: skip


def texts(pieces: list[Chunk], count: int = 3) -> list[str]:
    return ["".join(piece.text for piece in pieces if piece.row == row) for row in range(count)]


@pytest.mark.parametrize("stop", [(), ("e",)])
def test_pieces_are_what_the_engine_samples(policy: Policy, stop: tuple[str, ...]) -> None:
    expected = TransformersEngine(stop).sample(policy, PROMPTS, W, 1, 12, 7)
    pieces = list(stream(policy, questions(policy, stop=stop)))
    assert texts(pieces) == [row[0] for row in expected.texts]
    last = {piece.row: piece for piece in pieces if piece.finish}
    assert [last[row].finish == "stop" for row in range(3)] == expected.finished[:, 0].tolist()
    assert len({len([p for p in pieces if p.row == row and p.text]) for row in range(3)} | {1}) > 1  # it streams


def test_a_response_does_not_depend_on_its_neighbours(policy: Policy) -> None:
    asked = questions(policy)
    together = texts(list(stream(policy, asked)))
    assert [texts(list(stream(policy, [question])), 1)[0] for question in asked] == together


def test_the_network_as_it_is_gives_the_same(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = texts(list(stream(policy, questions(policy))))
    monkeypatch.setattr("miepo.trained.streaming.fits", lambda policy: False)
    assert texts(list(stream(policy, questions(policy)))) == fused


def test_the_plain_decoder_keeps_rows(policy: Policy) -> None:
    prompts = policy.encode(PROMPTS, W)
    tokens = torch.tensor([11, 12, 13])
    with torch.no_grad():
        plain, fused = PlainDecoder(policy, prompts, W), FusedDecoder(policy, prompts, W, 1, 5)
        torch.testing.assert_close(plain.start(), fused.start(), rtol=1e-4, atol=1e-4)
        for decoder in (plain, fused):
            decoder.next(tokens)
            decoder.keep(torch.tensor([0, 2]))
        torch.testing.assert_close(plain.next(tokens[1:]), fused.next(tokens[1:]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
def test_who_comes_later_is_answered_alike(policy: Policy, monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """Questions of other lengths join at other tokens, while some are at their first and others end."""
    asked = [replace(q, max_new_tokens=n) for q, n in zip(questions(policy), (20, 9, 14), strict=True)]
    asked += [replace(asked[1], seed=3, max_new_tokens=25), replace(asked[2], seed=4), replace(asked[0], temperature=0)]
    expected = [texts(list(stream(policy, [question])), 1)[0] for question in asked]
    if not fused:
        monkeypatch.setattr("miepo.trained.streaming.fits", lambda policy: False)
    responder, pieces, sizes = ContinuousDecoder(policy, 4), [], []
    joins = {0: asked[:1], 2: asked[1:3], 3: asked[3:4], 11: asked[4:]}
    for t in range(60):
        if come := joins.get(t):
            assert responder.joins
            rows = responder.join(come)
            assert [asked[row] for row in rows] == come
        if len(responder):
            pieces += responder.step()
            sizes.append(len(responder))
    assert texts(pieces, 6) == expected
    assert max(sizes) >= 4
    assert [sum(p.finish is not None for p in pieces if p.row == row) for row in range(6)] == [1] * 6


@pytest.mark.parametrize("kind", [FusedDecoder, PlainDecoder])
def test_places_that_no_row_reads_are_let_go(policy: Policy, kind: type) -> None:
    """So that a cache does not grow with all that was ever said."""
    room = 30
    extra = (1, room) if kind is FusedDecoder else ()

    def decoder(i: int) -> FusedDecoder | PlainDecoder:
        made = kind(policy, policy.encode(PROMPTS[i : i + 1], W[i : i + 1]), W[i : i + 1], *extra)
        made.start()
        return made

    with torch.no_grad():
        one = decoder(1)
        for i in range(12):
            one.next(torch.tensor([11]))
            one.join(decoder(2 * (i % 2)))
            one.next(torch.tensor([12, 13]))
            one.keep(torch.tensor([1]))
    keys = one.keys[0] if isinstance(one, FusedDecoder) else one.cache.layers[0].keys.transpose(-1, -2)
    longest = policy.encode(PROMPTS, W).ids.shape[1]
    assert keys.shape[-1] <= longest + 2 + (room if extra else 0)  # and not 24 tokens and more


def test_an_error_while_caches_are_joined_ends_all(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = questions(policy)
    responder = ContinuousDecoder(policy, 4)
    responder.join(asked[:1])
    with pytest.raises(UserError, match="expected at most 256 together"):
        responder.join([replace(asked[1], max_new_tokens=1000)])
    assert len(responder) == 1
    monkeypatch.setattr(FusedDecoder, "join", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        responder.join(asked[1:])
    assert len(responder) == 0
    assert responder.join(asked[2:]) == [1]  # and it goes on
    assert texts([replace(p, row=0) for _ in range(12) if len(responder) for p in responder.step()], 1) == texts(
        list(stream(policy, asked[2:])), 1
    )


def test_settings_are_of_each_question(policy: Policy) -> None:
    greedy, other = questions(policy, temperature=0.0)[0], questions(policy, max_new_tokens=3)[1]
    pieces = list(stream(policy, [greedy, other, questions(policy, temperature=0.0, seed=99)[0]]))
    found = texts(pieces)
    assert found[0] == found[2]  # the most probable tokens, whatever the seed
    assert [p.tokens for p in pieces if p.row == 1][-1] <= 3
    assert torch.is_grad_enabled()


def test_what_nobody_waits_for_ends(policy: Policy) -> None:
    seen: list[Chunk] = []
    for piece in stream(policy, questions(policy), cancelled=lambda row: row == 1 and len(seen) > 2):
        seen.append(piece)
    assert [p.finish for p in seen if p.row == 1][-1] == "cancelled"
    assert all(p.finish != "cancelled" for p in seen if p.row != 1)


def test_a_question_that_does_not_fit(policy: Policy) -> None:
    with pytest.raises(UserError, match="the response may have 1000: expected at most 256 together"):
        list(stream(policy, questions(policy, max_new_tokens=1000)))


def test_nucleus() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1)
    uniform = torch.full((3,), 0.9, dtype=torch.float64)
    chosen = choose(logits, torch.ones(3), torch.tensor([1.0, 0.7, 0.4]), uniform)
    assert chosen.tolist() == [2, 1, 0]  # of all, of the first two, of the first


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from("ab e\n é😀"), max_size=12),
    stop=st.lists(st.text(st.sampled_from("abe "), min_size=1, max_size=3), max_size=2),
)
def test_text_by_token_is_the_text_of_all_tokens(text: str, stop: list[str]) -> None:
    """Of all until the first stop text was there, after which none are drawn."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    said = ResponseText(tokenizer, stop)
    shown = ""
    for token in ids:
        shown += said.add(token)
        if said.stopped:
            break
    shown += said.end()
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert said.stopped == any(end in whole for end in stop)
    assert shown == cut_at(tokenizer.decode(said.ids, skip_special_tokens=True), stop).strip()


def test_the_most_probable_token_is_always_left() -> None:
    logits = torch.tensor([[0.1, 0.7, 0.2]]).log()
    uniform = torch.tensor([0.99], dtype=torch.float64)
    assert choose(logits, torch.ones(1), torch.tensor([1e-60]), uniform).tolist() == [1]


def test_threads_do_not_share_a_preference(policy: Policy) -> None:
    asked = questions(policy)
    expected = [texts(list(stream(policy, [question])), 1) for question in asked]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: texts(list(stream(policy, [asked[i % 3]])), 1), range(18)))
    assert found == expected * 6


def _llama_like() -> PreTrainedTokenizerFast:
    """A tokenizer with tokens of single bytes."""
    single = {f"<0x{byte:02X}>": byte for byte in range(256)}
    vocabulary = single | {"<unk>": 256, "\u2581garden": 257, "\u2581the": 258, "ing": 259}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


LLAMA_LIKE = _llama_like()


@settings(max_examples=300, deadline=None)
@given(ids=st.lists(st.sampled_from([257, 258, 259, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80]), max_size=12))
def test_text_by_token_of_tokens_by_bytes(ids: list[int]) -> None:
    """Whatever bytes come: no word is lost or said twice. (Of a run of bytes that is none in the end, what was a
    character so far may have been shown.)"""
    said, shown = ResponseText(LLAMA_LIKE), ""
    for token in ids:
        shown += said.add(token)
    shown += said.end()
    whole = LLAMA_LIKE.decode(ids, skip_special_tokens=True)
    words, wanted = (re.sub("[^a-z]", "", text) for text in (shown, whole))
    assert words == wanted
    if "\ufffd" not in whole:
        assert shown == whole.strip()


def test_bytes_that_are_no_character_end_nothing() -> None:
    """A tokenizer as Llama's: tokens of single bytes."""
    vocabulary = {"<unk>": 0, "<0x0A>": 1, "<0xC3>": 2, "\u2581garden": 3, "\u2581the": 4}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    said = ResponseText(tokenizer)
    shown = "".join(said.add(token) for token in (4, 1, 2, 3, 2, 4)) + said.end()
    assert shown.startswith("the")
    assert "garden" in shown
