"""A session must hold exactly the conversation, whatever ended an answer."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import tile_after_tile

from mono_internvl import ChatSession, load
from mono_internvl.configuration.model import MonoInternVLConfig
from mono_internvl.errors import CheckpointError, ConfigError, ImageError, PromptError
from mono_internvl.experts import Routing
from mono_internvl.generation import engine as engine_module
from mono_internvl.generation.prefix import signature_of
from mono_internvl.generation.sampling import Sampling, choose_tokens
from mono_internvl.model.modeling import MonoInternVLForConditionalGeneration
from mono_internvl.processing.processor import MonoInternVLProcessor

GOLDEN = Path(os.environ.get("GOLDEN_DIR") or Path(__file__).parents[1] / "parity" / "golden")
PYTHON = GOLDEN / "python"
QUESTION = "Please describe the image shortly."
TOLERANCE = (
    1e-4  # measured 5e-6; an image of a later turn sent through the text expert moves it by 0.1
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "mono_a" / name, folder)
    for file in (GOLDEN / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def parts(checkpoint):
    return (
        MonoInternVLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32),
        MonoInternVLProcessor.from_pretrained(checkpoint),
    )


@pytest.fixture
def session(parts):
    return ChatSession(*parts, max_tiles=2, sampling=Sampling(max_new_tokens=12))


@pytest.fixture
def picture():
    return Image.open(PYTHON / "chat_a.png").convert("RGB")


def golden_chat(turn):
    return json.loads((PYTHON / "chat.json").read_text(encoding="utf-8"))[turn]


def script(session, monkeypatch, *ids):
    """Let the model say these ids."""
    queue = list(ids)
    monkeypatch.setattr(engine_module, "choose_tokens", lambda *_: [queue.pop(0)])


@pytest.fixture
def chosen_from(monkeypatch):
    """The logits that tokens are chosen from, one after another."""
    found = []

    def choose(logits, *rest):
        found.append(logits)
        return choose_tokens(logits, *rest)

    monkeypatch.setattr(engine_module, "choose_tokens", choose)
    return found


def ids_of(session, text):
    return session.processor.tokenizer.encode_plain(text).ids


def control(session, name):
    return session.processor.tokenizer.control_id(name)


def assert_kept_is_full_prefill(session, pixel_values, generated_contexts=()):
    """The engine keeps what one pass over all ids and all images gives, but for the last token or
    two, which nothing was decoded behind."""
    ids = torch.tensor([session.ids])
    is_visual = ids == session.processor.image_token_id
    is_visual[0, list(generated_contexts)] = False
    with torch.inference_mode():
        full = session.model(
            ids, pixel_values=pixel_values, visual_token_mask=is_visual, use_cache=True
        )
    session.engine.step()
    per_tile = session.processor.tokens_per_tile
    shown = tile_after_tile(is_visual, per_tile)
    signature = signature_of(ids[0], is_visual[0], pixel_values, shown)
    length, kept = session.engine.prefixes.find(signature)
    assert length >= len(session.ids) - 2
    theirs = [x[0] for one in full.past_key_values.layers for x in (one.keys, one.values)]
    for x, expected in zip(kept, theirs, strict=True):
        torch.testing.assert_close(x[:, :length], expected[:, :length], atol=TOLERANCE, rtol=0)


# ------------------------------------------------------------------------------- the reference


def test_session_first_turn_equals_reference(session, picture):
    golden = golden_chat("chat_turn1")
    answer = session.ask(QUESTION, [picture])
    assert list(session.ids[: answer.tokens.prompt]) == golden["input_ids"][0]
    assert list(answer.ids) == golden["output_ids_without_leading_bos"][0]
    assert answer.text == golden["response"]
    assert answer.finish_reason == "length"


def test_session_history_encodes_to_the_reference_second_turn(session, picture, parts):
    model, processor = parts
    golden = golden_chat("chat_turn2")
    session.ask(QUESTION, [picture])
    turns = processor.tokenizer.decode(golden["input_ids"][0]).split("<|im_start|>")
    question = turns[-2].removeprefix("user\n").removesuffix("<|im_end|>")
    messages = [*session.history, {"role": "user", "content": question}]
    batch = processor.encode_prompt(messages, max_tiles=2)
    assert batch["input_ids"].tolist() == golden["input_ids"]
    out = model.generate(**batch, max_new_tokens=12, do_sample=False, eos_token_id=None)
    new = out[0, batch["input_ids"].shape[1] :].tolist()
    assert new == golden["output_ids_without_leading_bos"][0]
    assert processor.decode_answer(new) == golden["response"]


# ------------------------------------------------------------------------------- the cache


def test_session_later_image_equals_full_prefill(session, picture, chosen_from):
    other = Image.open(PYTHON / "chat_b.png").convert("RGB")
    session.ask("Hello?")
    session.ask("What is this?", [picture])
    chosen_from.clear()
    answer = session.ask("And this?", [other], max_tiles=1)
    pixels = torch.cat(
        [
            session.processor.image_processor([picture], max_tiles=2)["pixel_values"],
            session.processor.image_processor([other], max_tiles=1)["pixel_values"],
        ]
    )
    assert answer.tokens.cached > 0
    assert_kept_is_full_prefill(session, pixels)
    with torch.inference_mode():
        ids = torch.tensor([session.ids[: answer.tokens.prompt]])
        full = session.model(ids, pixel_values=pixels, logits_to_keep=1).logits[:, -1]
    torch.testing.assert_close(chosen_from[0], full, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"image_attention": "bidirectional"},
        {"visual_position_step": 0.25},
        {"image_attention": "bidirectional", "visual_position_step": 1 / 64},
    ],
    ids=str,
)
def test_session_with_image_options_holds_what_one_pass_gives(
    session, picture, monkeypatch, options
):
    for name, value in options.items():
        monkeypatch.setattr(session.model.config, name, value)
    other = Image.open(PYTHON / "chat_b.png").convert("RGB")
    session.ask("Hello?")
    hook = session.model.model.language_model.layers[1].register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.ask("What is this?", [other])
    hook.remove()
    session.ask("What is this?", [picture])
    session.ask("And this?", [other], max_tiles=1)
    pixels = torch.cat(
        [
            session.processor.image_processor([picture], max_tiles=2)["pixel_values"],
            session.processor.image_processor([other], max_tiles=1)["pixel_values"],
        ]
    )
    assert_kept_is_full_prefill(session, pixels)
    for name in options:
        monkeypatch.setattr(session.model.config, name, {"image_attention": "causal"}.get(name, 1))
    with pytest.raises(AssertionError, match="not close"):
        assert_kept_is_full_prefill(session, pixels)


def _interrupt(*_):
    raise KeyboardInterrupt


def test_session_cache_check_rejects_an_image_read_as_text(session, picture, monkeypatch):
    session.ask("Hello?")
    with monkeypatch.context() as fault:
        fault.setattr(
            Routing, "by", lambda self, _: Routing.all_text(self.num_text + self.num_visual)
        )
        session.ask("What is this?", [picture])
    pixels = session.processor.image_processor([picture], max_tiles=2)["pixel_values"]
    with pytest.raises(AssertionError, match="not close"):
        assert_kept_is_full_prefill(session, pixels)


def test_session_later_turn_reads_only_its_own_tokens(session, monkeypatch):
    first = session.ask("Hello?")
    read = []
    monkeypatch.setattr(
        session.model.model.language_model,
        "forward",
        _counting(session.model.model.language_model.forward, read),
    )
    second = session.ask("Again?")
    assert (first.finish_reason, second.finish_reason) == ("length", "length")
    assert second.tokens.cached == first.tokens.prompt + first.tokens.generated - 1
    assert sum(read) == second.tokens.prompt - second.tokens.cached + second.tokens.generated - 1


def _random_model(checkpoint, **text_fields):
    """Of the checkpoint's shape, with other fields of its language model."""
    config = MonoInternVLConfig.from_pretrained(checkpoint)
    text = config.text_config
    config.text_config = type(text)(**{**text.to_dict(), **text_fields})
    torch.manual_seed(0)
    return MonoInternVLForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"sliding_layers": [1, 0, 1], "sliding_window": 24},
        *(
            {
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6},
                "max_position_embeddings": most,
            }
            for most in (60, 75, 115, 150)
        ),
    ],
    ids=["plain", "sliding", *(f"dynamic, {most}" for most in (60, 75, 115, 150))],
)
def test_session_turns_equal_generate_over_the_whole_conversation(checkpoint, picture, fields):
    """Whether scaling sets in before a turn, within an answer or never."""
    model = _random_model(checkpoint, **fields)
    processor = MonoInternVLProcessor.from_pretrained(checkpoint)
    session = ChatSession(model, processor, max_tiles=2, sampling=Sampling(max_new_tokens=10))
    pixels = processor.image_processor([picture], max_tiles=2)["pixel_values"]
    for question, images in (("Hello?", []), ("What is this?", [picture]), ("Sure?", [])):
        answer = session.ask(question, images)
        prompt = torch.tensor([session.ids[: answer.tokens.prompt]])
        is_visual = prompt == processor.image_token_id
        tiles = {"pixel_values": pixels} if bool(is_visual.any()) else {}
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **tiles,
            max_new_tokens=10,
            do_sample=False,
            eos_token_id=sorted(processor.stop_token_ids),
        )
        found = [*answer.ids, *([] if answer.finish_reason == "length" else [out[0, -1].item()])]
        assert found == out[0, prompt.shape[1] :].tolist(), question


def test_session_answers_within_the_memory_of_its_engine(session):
    session.engine.cache.max_tokens = 100
    answer = session.ask("Hello?", max_new_tokens=500)
    assert answer.finish_reason == "length" and len(session.ids) == 100
    with pytest.raises(PromptError, match="the model reads 100 with the answer"):
        session.ask("Again?")


def _counting(forward, read):
    def counted(input_ids=None, inputs_embeds=None, *args, **kwargs):
        x = inputs_embeds if input_ids is None else input_ids
        read.append(x.shape[1])
        return forward(input_ids, inputs_embeds, *args, **kwargs)

    return counted


@pytest.mark.parametrize("stop", ["<|im_end|>", "</s>", "<|im_start|>", None])
def test_session_answer_is_closed_as_the_template_does(session, picture, monkeypatch, stop):
    words = ids_of(session, "a man sits")
    script(session, monkeypatch, *words, *([control(session, stop)] if stop else []))
    answer = session.ask("Who?", [picture], max_new_tokens=20 if stop else len(words))
    assert answer.text == "a man sits"
    assert answer.finish_reason == ("stop" if stop else "length")
    assert answer.tokens.generated == len(words)
    following = {"role": "user", "content": "Where?"}
    whole = session.processor.encode_prompt([*session.history, following], max_tiles=2)
    suffix = session.processor.encode_turn(following, close_previous=False)
    assert [*session.ids, *suffix["input_ids"][0].tolist()] == whole["input_ids"][0].tolist()
    assert_kept_is_full_prefill(session, whole["pixel_values"])


def test_session_empty_answer_is_closed(session, monkeypatch):
    script(session, monkeypatch, control(session, "<|im_end|>"))
    answer = session.ask("Nothing?")
    assert (answer.text, answer.tokens.generated, answer.finish_reason) == ("", 0, "stop")
    assert session.ids[-1] == control(session, "<|im_end|>")
    assert_kept_is_full_prefill(session, None)


def test_session_keeps_generated_ids_where_text_would_tokenize_otherwise(session, monkeypatch):
    letters = [ids_of(session, letter)[0] for letter in "man"]
    assert letters != ids_of(session, "man")
    script(session, monkeypatch, *letters, control(session, "<|im_end|>"))
    answer = session.ask("Who?")
    assert answer.ids == tuple(letters)
    assert list(session.ids[answer.tokens.prompt : -1]) == letters


def test_session_generated_context_token_is_text(session, picture, monkeypatch):
    context = session.processor.image_token_id
    script(session, monkeypatch, context, ids_of(session, "a")[0], context)
    answer = session.ask("Who?", [picture], max_new_tokens=3)
    assert answer.text == "a"
    pixels = session.processor.image_processor([picture], max_tiles=2)["pixel_values"]
    at = answer.tokens.prompt
    assert_kept_is_full_prefill(session, pixels, generated_contexts=(at, at + 2))


def test_session_reset_forgets(session):
    first = session.ask("Hello?")
    session.reset()
    assert session.history == [] and session.ids == ()
    assert session.ask("Hello?").ids == first.ids


def test_session_system_message_replaces_the_default(parts):
    without = ChatSession(*parts, system="").ask("Hi?", max_new_tokens=1)
    with_own = ChatSession(*parts, system="Be brief.").ask("Hi?", max_new_tokens=1)
    default = ChatSession(*parts).ask("Hi?", max_new_tokens=1)
    assert without.tokens.prompt < with_own.tokens.prompt < default.tokens.prompt


# ------------------------------------------------------------------------------- streaming


def test_session_stream_is_the_answer(session, picture):
    pieces = []
    answer = session.ask(QUESTION, [picture], stream=pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) > 3


def test_session_stream_never_breaks_a_character(session, monkeypatch):
    text = "a 🦊 你 é b"
    ids = ids_of(session, text)
    assert len(ids) > len(text)  # some characters are spelled in bytes
    script(session, monkeypatch, *ids, control(session, "<|im_end|>"))
    pieces = []
    answer = session.ask("Animal?", stream=pieces.append, max_new_tokens=99)
    assert "".join(pieces) == answer.text == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_session_stream_ends_with_a_character_that_stayed_broken(session, monkeypatch):
    ids = ids_of(session, "🦊")[:-1]
    script(session, monkeypatch, *ids)
    pieces = []
    answer = session.ask("Animal?", stream=pieces.append, max_new_tokens=len(ids))
    assert "".join(pieces) == answer.text and set(answer.text) == {"\ufffd"}


def test_session_stream_returns_the_answer(session):
    stream = session.ask_stream("Hello?")
    pieces = []
    with pytest.raises(StopIteration) as end:
        while True:
            pieces.append(next(stream))
    assert end.value.value.text == "".join(pieces)


def test_session_boxes_are_parsed_and_history_keeps_grounding(session, monkeypatch):
    tokens = [
        control(session, "<ref>"),
        *ids_of(session, "man"),
        control(session, "</ref>"),
        control(session, "<box>"),
        *ids_of(session, "[[1, 20, 300, 1000]]"),
        control(session, "</box>"),
        control(session, "<|im_end|>"),
    ]
    script(session, monkeypatch, *tokens)
    answer = session.ask("Where?", max_new_tokens=99)
    assert answer.boxes == ((1, 20, 300, 1000),)
    assert answer.text == "man[[1, 20, 300, 1000]]"
    said = session.history[-1]["content"]
    assert said == "<ref>man</ref><box>[[1, 20, 300, 1000]]</box>"


# ------------------------------------------------------------------------------- interruptions


def test_session_interrupted_answer_is_kept_and_closed(session, picture):
    session.ask("Hello?")
    seen = []

    def stop_at_third(piece):
        seen.append(piece)
        if len(seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.ask("What is this?", [picture], stream=stop_at_third)
    assert session.history[-1]["content"].startswith("".join(seen))
    assert session.ids[-1] == control(session, "<|im_end|>")
    pixels = session.processor.image_processor([picture], max_tiles=2)["pixel_values"]
    assert_kept_is_full_prefill(session, pixels)
    session.ask("Go on?")
    assert_kept_is_full_prefill(session, pixels)


def test_session_closed_stream_is_kept_and_closed(session):
    stream = session.ask_stream("Hello?")
    next(stream)
    stream.close()
    assert len(session.history) == 2
    assert_kept_is_full_prefill(session, None)


@pytest.mark.parametrize("turn", [1, 2])
@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_session_failure_between_layers_leaves_no_trace(session, picture, parts, turn, failure):
    if turn == 2:
        session.ask("Hello?")
    before, history = session.ids, session.history

    def fail(*_):
        raise failure

    layer = parts[0].model.language_model.layers[1]
    hook = layer.register_forward_pre_hook(fail)
    try:
        with pytest.raises(failure):
            session.ask("What is this?", [picture])
    finally:
        hook.remove()
    assert session.ids == before and session.history == history
    session.ask("Still there?")
    assert_kept_is_full_prefill(session, None)


def test_session_interrupt_between_layers_while_decoding_keeps_the_answer(session, parts):
    passes = []

    def fail_at_fourth(*_):
        passes.append(1)
        if len(passes) == 4:
            raise KeyboardInterrupt

    hook = parts[0].model.language_model.layers[1].register_forward_pre_hook(fail_at_fourth)
    try:
        with pytest.raises(KeyboardInterrupt):
            session.ask("Hello?")
    finally:
        hook.remove()
    assert len(session.history) == 2
    assert_kept_is_full_prefill(session, None)


def test_session_refuses_a_second_answer_while_one_streams(session):
    stream = session.ask_stream("Hello?")
    next(stream)
    with pytest.raises(PromptError, match="still being streamed"):
        session.ask("Me too?")
    with pytest.raises(PromptError, match="still being streamed"):
        session.reset()
    stream.close()
    session.ask("Now?")


# ------------------------------------------------------------------------------- refusals


def _broken(tmp_path):
    file = tmp_path / "notes.png"
    file.write_text("no image")
    return file


@pytest.mark.parametrize(
    ("question", "options", "error", "message"),
    [
        ("  ", {}, PromptError, "question='  '"),
        ("<image> and <image>", {}, PromptError, "2 <image> placeholders but 0 images"),
        (None, {}, PromptError, "question=None"),
        ("Hi?", {"images": None}, PromptError, "NoneType"),
        ("Hi?", {"max_tiles": 1.5}, ConfigError, "max_tiles=1.5; expected an integer"),
        ("Hi?", {"max_tiles": "2"}, ConfigError, "max_tiles='2'; expected an integer"),
        ("Hi?", {"temperature": -1}, ConfigError, "temperature=-1"),
        ("Hi?", {"temperature": "1"}, ConfigError, "temperature='1'"),
        ("Hi?", {"temperature": float("nan")}, ConfigError, "temperature=nan"),
        ("Hi?", {"temperature": 1e-300}, ConfigError, "temperature=1e-300; expected 0 .greedy"),
        ("Hi?", {"repetition_penalty": 1e-300}, ConfigError, "penalty=1e-300; expected a number"),
        ("Hi?", {"top_k": 1.5}, ConfigError, "top_k=1.5; expected an integer"),
        ("Hi?", {"max_new_tokens": "5"}, ConfigError, "max_new_tokens='5'"),
        ("Hi?", {"max_new_tokens": None}, ConfigError, "max_new_tokens=None"),
        ("Hi?", {"max_new_tokens": 3.5}, ConfigError, "max_new_tokens=3.5"),
        ("Hi?", {"seed": 2**64}, ConfigError, "seed=18446744073709551616"),
        ("Hi?", {"seed": "x"}, ConfigError, "seed='x'"),
        ("Hi?", {"top_p": 0}, ConfigError, "top_p=0"),
        ("Hi?", {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        ("Hi?", {"beams": 4}, ConfigError, "beams"),
    ],
)
def test_session_refusal_leaves_it_unchanged(session, question, options, error, message):
    session.ask("Hello?")
    before, history = session.ids, session.history
    with pytest.raises(error, match=message):
        session.ask(question, **options)
    assert session.ids == before and session.history == history


def test_session_bad_image_leaves_it_unchanged(session, picture, tmp_path):
    session.ask("Hello?")
    before, history = session.ids, session.history
    for bad in (_broken(tmp_path), tmp_path / "missing.png"):
        with pytest.raises(ImageError, match=bad.name):
            session.ask("What is this?", [picture, bad])
    assert session.ids == before and session.history == history


def test_session_overflow_is_refused_and_answers_stop_in_time(session, monkeypatch):
    text = session.model.config.get_text_config()
    answer = session.ask("Hello?", max_new_tokens=1)
    before = session.ids
    monkeypatch.setattr(text, "max_position_embeddings", len(before) + 3)
    with pytest.raises(PromptError, match=f"the model reads {len(before) + 3}"):
        session.ask("One more question?")
    assert session.ids == before
    monkeypatch.setattr(text, "max_position_embeddings", answer.tokens.prompt + 40)
    last = session.ask("Again?", max_new_tokens=100)
    assert last.finish_reason == "length"
    assert len(session.ids) == answer.tokens.prompt + 40


def test_session_dynamic_rope_has_no_limit(session, monkeypatch):
    text = session.model.config.get_text_config()
    monkeypatch.setattr(text, "max_position_embeddings", 16)
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    monkeypatch.setattr(text, "rope_parameters", rope)
    assert session.ask("Hello?").tokens.prompt > 16


def test_session_refuses_a_foreign_processor(parts):
    model, processor = parts
    config = model.config
    original = config.image_token_id
    config.image_token_id = original - 1
    try:
        with pytest.raises(ConfigError, match="IMG_CONTEXT"):
            ChatSession(model, processor)
    finally:
        config.image_token_id = original


# ------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("temperature", [0, 1])
def test_session_refuses_logits_that_are_not_numbers(checkpoint, temperature):
    session = load(checkpoint, device="cpu")
    with torch.no_grad():
        session.model.get_output_embeddings().weight[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite numbers in torch\.float32"):
        session.ask("Hello?", temperature=temperature)
    assert session.ids == ()


def test_sampling_least_temperature_in_half_precision():
    options = Sampling(temperature=1e-4, seed=2**64 - 1, max_new_tokens=3)
    logits = torch.tensor([[-60.0, 50.0, 60.0]], dtype=torch.float16)
    assert choose_tokens(logits.float(), [options], [()], [None]) == [2]


def test_sampling_seed_repeats_an_answer(parts):
    def sample(seed):
        session = ChatSession(*parts)
        return session.ask("Hello?", temperature=1.0, seed=seed, max_new_tokens=12).ids

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_limits_are_greedy(parts, options):
    common = {"temperature": 1.0, "max_new_tokens": 12}
    greedy = ChatSession(*parts).ask("Hello?", max_new_tokens=12).ids
    assert ChatSession(*parts).ask("Hello?", **{**common, **options}).ids == greedy


def test_sampling_penalty_equals_transformers(parts):
    model, processor = parts
    batch = processor.encode_prompt([{"role": "user", "content": "Hello?"}])
    out = model.generate(
        **batch, max_new_tokens=12, do_sample=False, repetition_penalty=0.5, eos_token_id=None
    )
    session = ChatSession(model, processor)
    session._stops = frozenset()
    answer = session.ask("Hello?", repetition_penalty=0.5, max_new_tokens=12)
    assert list(answer.ids) == out[0, batch["input_ids"].shape[1] :].tolist()
    assert answer.ids != ChatSession(model, processor).ask("Hello?", max_new_tokens=12).ids


# ------------------------------------------------------------------------------- loading


@pytest.mark.parametrize(
    ("precision", "expected"), [("auto", "float32"), ("fp32", "float32"), ("bf16", "bfloat16")]
)
def test_load_precision(checkpoint, precision, expected):
    session = load(checkpoint, device="cpu", precision=precision)
    assert session.model.dtype == getattr(torch, expected)
    attention = session.model.config.get_text_config()._attn_implementation
    assert (
        attention == {"float32": "sdpa", "bfloat16": "blocked"}[expected] == session.plan.attention
    )
    assert session.ask("Hello?", [PYTHON / "chat_b.png"], max_new_tokens=2).tokens.generated <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int3"}, "precision='int3'; expected one of auto, bf16, fp32, int8"),
        ({"threads": 0}, "threads=0"),
        ({"device": "abacus"}, "device='abacus'"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "cuda"}, "0 cuda devices"),
    ],
)
def test_load_refuses_unknown_places(checkpoint, monkeypatch, options, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=message):
        load(checkpoint, **options)


# ------------------------------------------------------------------------------- after a reset


def test_session_reset_reads_the_same_image_once(session, picture):
    fresh = session.ask("What is this?", [picture])
    session.ask("Sure?")
    session.reset()
    embedded = []
    hook = session.model.model.vision_embedder.register_forward_hook(
        lambda module, args, out: embedded.append(len(out))
    )
    again = session.ask("How many things are there?", [picture])
    hook.remove()
    image_tokens = session.ids.count(session.processor.image_token_id)
    assert embedded == [] and again.tokens.cached > image_tokens > 0
    pixels = session.processor.image_processor([picture], max_tiles=2)["pixel_values"]
    assert_kept_is_full_prefill(session, pixels)
    session.reset()
    same = session.ask("What is this?", [picture])
    assert same.ids == fresh.ids and same.tokens.prompt == fresh.tokens.prompt


def test_session_reset_reads_another_image_of_the_same_size(session, picture):
    session.ask("What is this?", [picture])
    session.reset()
    other = picture.transpose(Image.Transpose.ROTATE_180)
    answer = session.ask("What is this?", [other])
    first_image = session.ids.index(session.processor.image_token_id)
    assert 0 < answer.tokens.cached <= first_image
    pixels = session.processor.image_processor([other], max_tiles=2)["pixel_values"]
    assert_kept_is_full_prefill(session, pixels)


def test_session_reset_after_a_failed_question_starts_anew(session, picture, monkeypatch):
    session.ask("What is this?", [picture])
    session.reset()
    with monkeypatch.context() as fault:
        fault.setattr(engine_module, "choose_tokens", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            session.ask("What is this?", [picture])
    assert session.ids == ()
    session.ask("What is this?", [picture])
    pixels = session.processor.image_processor([picture], max_tiles=2)["pixel_values"]
    assert_kept_is_full_prefill(session, pixels)


@pytest.mark.parametrize(("limit", "is_shared"), [(16, False), (108, False), (4096, True)])
def test_session_reset_reads_anew_what_dynamic_scaling_turns_by_the_length(
    parts, picture, monkeypatch, chosen_from, limit, is_shared
):
    """Of 93 and 109 tokens: both beyond the limit, only the second, none."""
    text = parts[0].config.get_text_config()
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    monkeypatch.setattr(text, "rope_parameters", rope)
    monkeypatch.setattr(text, "max_position_embeddings", limit)
    question = "How many things are there in all of it?"
    session, fresh = (
        ChatSession(*parts, max_tiles=2, sampling=Sampling(max_new_tokens=4)) for _ in range(2)
    )
    expected = fresh.ask(question, [picture])
    logits = chosen_from[0]
    assert session.ask("What?", [picture]).tokens.prompt == 93
    session.reset()
    chosen_from.clear()
    found = session.ask(question, [picture])
    assert found.tokens.prompt == 109
    assert (found.tokens.cached > 0) == is_shared
    assert found.ids == expected.ids
    torch.testing.assert_close(chosen_from[0], logits, rtol=0, atol=TOLERANCE)


def test_session_and_answer_print_in_one_line(session):
    answer = session.ask(QUESTION, max_new_tokens=3)
    assert str(answer) == answer.text
    assert f"2 messages, {len(session.ids)} tokens" in repr(session)
    assert "float32 on cpu" in repr(session) and "\n" not in repr(session)
