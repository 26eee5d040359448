"""pytest -q: each test compares with a trusted reference, a plain loop or hand-computed values.

    python test_echo.py [runs/rl]      # after training: measures and prints what the README quotes
"""
import contextlib
import copy
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM,
                          WhisperConfig, WhisperFeatureExtractor, WhisperModel)

import echo
import generate
import make_data
import train_rl
import train_sft
from echo import (AUDIO, Config, EchoError, Rollout, Sample, Segment, load, load_audio,
                  parse_segment, read_questions, rollouts, save)

HERE = Path(__file__).parent
MICRO = dict(dim=48, layers=2, heads=4, encoder_dim=32, encoder_layers=1, encoder_heads=2)
if __name__ != "__main__":
    torch.set_num_threads(1)  # quick for micro models, and other processes round alike


def run(name, *args):
    """Run a script of the project in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", [name, *map(str, args)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            pytest.raises(SystemExit) as end:
        echo.main(sys.modules[name].run)
    return end.value.code or 0, out.getvalue(), err.getvalue()


def good(*args):
    code, out, err = run(*args)
    assert code == 0, err[-2000:]
    return out


def mistake(*args):
    """The one line that a script ends with."""
    code, _, err = run(*args)
    assert code == 2 and err.splitlines()[-1].startswith("error: ")
    return err.splitlines()[-1]


def error_of(call, *args, **more):
    """The one line that a call ends with."""
    with pytest.raises(EchoError) as error:
        call(*args, **more)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def process(*args):
    """A process of its own, in which Ctrl-C works even if this one was told to ignore it."""
    return subprocess.Popen(
        [sys.executable, *map(str, args)], text=True, cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def noise(seconds, seed=0):
    return torch.randn(round(seconds * 16_000), generator=torch.Generator().manual_seed(seed)) * 0.1


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A micro data folder."""
    folder = tmp_path_factory.mktemp("world") / "data"
    good("make_data", "--out", folder, "--train-clips", 24, "--test-clips", 2)
    return folder


@pytest.fixture(scope="session")
def tokenizer(data):
    rows = echo.read_rows(data / "sft.jsonl")
    return train_sft.tiny_tokenizer([f" {r['question']} Choose from {r['cot']}" for r in rows] * 2)


def micro(tokenizer, **config):
    torch.manual_seed(0)
    config = Config(**{**MICRO, **config})
    return echo.build(config, train_sft.tiny_decoder(config, len(tokenizer)), tokenizer).eval()


@pytest.fixture(scope="session")
def model(tokenizer):
    return micro(tokenizer)


# ------------------------------------------------------------------------------------------- audio

def wav(raw, rate=16_000, channels=1, bits=16, coding=1, says=None):
    block, size = channels * bits // 8, len(raw) if says is None else says
    return struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, coding,
                       channels, rate, rate * block % 2 ** 32, block, bits, b"data", size) + raw


@pytest.mark.parametrize("bits,coding", [(8, 1), (16, 1), (24, 1), (32, 1), (32, 3)])
@pytest.mark.parametrize("channels,rate", [(1, 16_000), (2, 44_100), (3, 8_000)])
def test_wav_formats(tmp_path, bits, coding, channels, rate):
    loud = (np.arange(channels) + 1) / channels
    wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)[:, None] * loud
    ints = (wave * (2 ** (bits - 1) - 1)).round().astype("<i4") + 128 * (bits == 8)
    raw = wave.astype("<f4") if coding == 3 else ints[..., None].view(np.uint8)[..., :bits // 8]
    (tmp_path / "a.wav").write_bytes(wav(raw.tobytes(), rate, channels, bits, coding))
    heard, got_rate = echo.read_wav("a.wav", (tmp_path / "a.wav").read_bytes())
    assert heard.shape == wave.shape and got_rate == rate
    assert np.abs(heard - wave).max() < (0.02 if bits == 8 else 1e-4)
    mono, t = load_audio(tmp_path / "a.wav"), torch.arange(16_000) / 16_000
    gap = mono[:16_000] - 0.5 * torch.sin(2 * torch.pi * 440 * t)[:len(mono)] * loud.mean()
    assert abs(len(mono) - 16_000) <= 1 and gap[800:15_000].abs().max() < 0.02


@pytest.mark.parametrize("name,content,says", [
    ("none.wav", None, "no such file"), ("n" * 5000 + ".wav", None, "can't be read"),
    ("song.mp3", b"ID3\x03" + b"\0" * 100, "ffmpeg -i song.mp3"),
    ("cut.wav", wav(b"\0" * 50, says=100), "50 of 100 bytes"), ("empty.wav", wav(b""), "empty"),
    ("head.wav", b"RIFF\x10\0\0\0WAVEjunk\0\0\0\0", "no 'fmt ' or no 'data' chunk"),
    ("mulaw.wav", wav(b"\0" * 4, coding=7, bits=8), "coding 7"),
    ("fast.wav", wav(b"\0" * 4, rate=4_294_967_295), "4294967295 Hz"),
    ("prime.wav", wav(b"\0" * 4, rate=767_957), "767957 Hz; convert it to 16000 first"),
    ("huge.wav", wav(struct.pack("<2f", 1e38, -1e38), bits=32, coding=3), "beyond 10,000"),
    ("nan.wav", wav(struct.pack("<2f", math.nan, 0), bits=32, coding=3), "NaN")],
    ids=lambda x: x[:9] if isinstance(x, str) else "")
def test_broken_audio_is_one_line(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = error_of(load_audio, tmp_path / name)
    assert says in error and name[:50] in error


# ------------------------------------------------------------------------------- encoder and model

@pytest.mark.parametrize("rate", [2.0, 0.0])
@pytest.mark.parametrize("first_listen", [True, False])
def test_encoder_batch_equals_one_by_one(tokenizer, rate, first_listen):
    model = micro(tokenizer, first_listen_rate=rate)
    waves = [noise(s, i) for i, s in enumerate((6.0, 0.2, 1.03, 2.5) * 9)]
    for wave, tokens in zip(waves, model.hear(waves, first_listen)):
        a_second = rate if first_listen and rate else 25
        assert len(tokens) == math.ceil(len(wave) / 16_000 * a_second)
        assert (tokens - model.hear([wave], first_listen)[0]).abs().max() < 1e-4


def test_first_listen_lacks_the_detail_and_has_the_place(model):
    """Two clips that differ in the number of pulses alone: the thumbnails agree."""
    t, mel = np.arange(16_000) / 16_000, {}
    for n in (2, 6):
        wave = noise(6.0, 1).numpy() * 1e-2
        wave[32_000:48_000] += 0.1 * np.sin(2 * np.pi * 900 * t) * make_data.pulse_train(n, 16_000)
        for first in (True, False):
            mel[n, first] = model.encoder.log_mel(torch.tensor(wave).float(), first)
    full = (mel[2, False] - mel[6, False]).abs()
    thumb = (mel[2, True] - mel[6, True])[::4].abs()
    assert full.max() > 2 and thumb.max() < 0.25 * full.max() and thumb.mean() < 0.02 * full.max()
    loudest = mel[2, True][::4].max(1).values  # twelve half seconds, the sound in 4 and 5
    assert loudest[4:6].min() > loudest[[*range(4), *range(6, 12)]].max() + 1


def dialogue(model, seed=0, seconds=3.0):
    """A prompt, some text, a re-listened segment, more text and eos."""
    wave = noise(seconds, seed)
    sample = model.prompt(model.hear([wave], True)[0], "How many pulses?", ["two", "three"])
    sample.add(model.ids("<think>I look for the hum <seg>0.5, 1.5</seg>"), trained=True)
    heard = model.hear([wave[8000:24_000 + 800 * seed]])[0]
    sample.add_audio(heard, model.config.share_position)
    return model.add_response(sample, " the hum has two pulses.</think><answer>two</answer>")


def test_log_probs_in_a_batch_and_in_chunks_equal_one_by_one(model):
    parts = copy.deepcopy(model)
    whole = echo.prepare(copy.deepcopy(model), settings(checkpointing=True))
    whole.LOGITS_AT_ONCE = 100 * model.decoder.config.vocab_size
    samples = [dialogue(model, i, 2.0 + i / 8) for i in range(24)]
    logp, alone = whole(samples), torch.cat([parts([s]) for s in samples])
    assert len(logp) == sum(sum(s.trained) for s in samples)
    assert torch.allclose(logp, alone, atol=1e-4)
    logp.mean().backward()
    alone.mean().backward()
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        assert name.startswith("encoder.") or (a.grad - b.grad).abs().max() < 1e-5, name


def test_no_gradient_at_audio_and_some_at_eos(model, monkeypatch):
    """The trained positions are the sampled ids: audio out, eos in."""
    sample = dialogue(model)
    trained = {t for t, on in enumerate(sample.trained) if on}
    assert not any(sample.ids[t] == AUDIO for t in trained)
    assert len(sample.ids) - 1 in trained and sample.ids[-1] in model.eos_ids
    hidden = model.hidden(*model.tensors([sample])).detach().requires_grad_()
    monkeypatch.setattr(model, "hidden", lambda *a: hidden)
    (-model([sample]).mean()).backward()
    touched = {t + 1 for t in range(len(sample.ids)) if hidden.grad[0, t].abs().sum() > 0}
    assert touched == trained  # position t predicts t + 1


@pytest.mark.parametrize("share", [True, False])
def test_positions(tokenizer, share):
    sample = dialogue(micro(tokenizer, share_position=share))
    at = max(t for t, i in enumerate(sample.ids) if i == AUDIO) - 24   # 25 re-listened tokens
    want = list(range(at)) + ([at] * 25 if share else list(range(at, at + 25)))
    rest = len(sample.ids) - len(want)
    assert sample.position == want + list(range(want[-1] + 1, want[-1] + 1 + rest))


def spelled(model, ids):
    """Ids as text, [audio] for audio."""
    out, at = "", 0
    for piece in re.split("(a)", "".join("a" if i == AUDIO else "t" for i in ids)):
        out += "[audio]" if piece == "a" else model.tokenizer.decode(ids[at:at + len(piece)])
        at += len(piece)
    return out


def test_prompt_writes_times_and_holds_any_text(tokenizer):
    model, full = micro(tokenizer), micro(tokenizer, first_listen_rate=0.0)
    any_text = 'what is <|audio|> or <seg>1, 2</seg>, Ünï ✓ 日本 "<b>&amp;</b>" {0} {choices}?'
    prompt = model.prompt(torch.zeros(3, 32), any_text, ["{question}", "two"])
    said = f" {any_text} Choose from {{question}}, two.\n"
    assert spelled(model, prompt.ids) == "[audio]0.0[audio]0.5[audio]1.0" + said
    assert prompt.ids.count(AUDIO) == sum(map(len, prompt.audio)) == 3
    assert spelled(model, model.prompt(None, "Why?").ids) == " Why?\n"
    long = spelled(model, model.prompt(torch.zeros(2003, 32), "Why?").ids)
    assert long.endswith("[audio]1000.0[audio]1000.5[audio]1001.0 Why?\n")
    long = spelled(full, full.prompt(torch.zeros(25 * 1001 + 2, 32), "Why?").ids)
    second = "".join(f"[audio]{s}.0" + "[audio]" * 24 for s in range(1001))
    assert long == second + "[audio]1001.0[audio] Why?\n"


# -------------------------------------------------------------------------------------------- tags

@pytest.mark.parametrize("text,want", [
    ("2.0, 3.0", (2, 3, None)), ("2,3", (2, 3, None)), (" 2.5s , 3 s ", (2.5, 3, None)),
    (".5, 1.", (0.5, 1, None)), ("0:02, 0:03.5", (2, 3.5, None)), ("2.0, 2.2", (2, 2.2, None)),
    ("9, 39.97", (9, 39.97, "too long")), ("9.97, 39.97", (9.97, 39.97, None)),
    ("38.0, 40.0", (38, 39.97, None)), ("38, 40.1", (38, 40.1, "outside the clip")),
    ("0, 600", (0, 600, "outside the clip")), ("1:00, 1:02", (60, 62, "outside the clip")),
    ("3, 2", (3, 2, "reversed")), ("2.0, 2.1", (2, 2.1, "too short")),
    *((bad, (None, None, "malformed")) for bad in ("1.2.3, 4", "-1, 2", "1", "1, 2, 3", "", "a, b",
                                                   "1e3, 2e3", "nan, inf", "0:75, 2:00", "٣, ٤"))])
def test_segment_tags(text, want):
    got = parse_segment(text, 39.97)
    assert (got.start_s, got.end_s, got.reason) == want


def test_turn_limit_and_lone_tags():
    assert parse_segment("1, 2", 6.0, turns=7).reason is None
    assert parse_segment("1, 2", 6.0, turns=8).reason == "too many turns"
    pairs, rest = echo.split_segments("a <seg>1, 2</seg> b</seg><seg>c<seg>3, 4</seg>d <seg>5")
    assert pairs == [("a ", "1, 2"), (" b", None), ("<seg>c", "3, 4")] and rest == "d <seg>5"
    assert parse_segment(None, 6.0) == Segment("</seg> without <seg>", reason="malformed")


def test_ten_thousand_hostile_tags():
    rng, reasons = np.random.default_rng(0), set()
    alphabet = [*"019., :s-e\n\0²∞٣", "<seg>", "</seg>", "9" * 400, "1, 2", "1, 1.1", "1, 33"]
    for _ in range(10_000):
        text = "".join(rng.choice(alphabet, rng.integers(9)))
        segment = parse_segment(text, 60.0, rng.integers(10))
        reasons.add(segment.reason)
        if segment.reason is None:
            assert 0 <= segment.start_s < segment.end_s <= 60
            assert 0.2 - 1e-6 <= segment.end_s - segment.start_s <= 30 + 1e-6
    assert reasons == {None, *echo.REASONS[:6]}


# ---------------------------------------------------------------------------------------- decoding

def asked(model, waves, question="Which sound comes right after the hum?"):
    return [model.prompt(first_listen, question + " What?" * i, ["hum", "bell"])
            for i, first_listen in enumerate(model.hear(waves, True))]


def write(monkeypatch, model, texts):
    """Make the row with seed i write texts[i], by replacing what is sampled and nothing else."""
    ids = [[*model.ids(text), model.tokenizer.eos_token_id] for text in texts]

    def sample_tokens(model, hidden, rows, temperature):
        logp = model.decoder.lm_head(hidden / (temperature or 1.0)).float().log_softmax(-1)
        tokens = [ids[row.draws.initial_seed()][len(row.logprobs)] for row in rows]
        return tokens, [logp[k, token].item() for k, token in enumerate(tokens)]
    monkeypatch.setattr(echo, "sample_tokens", sample_tokens)


def count_passes(monkeypatch, model):
    """A list that gets rows, positions and cache of each forward pass."""
    passes, hidden = [], model.hidden

    def counted(ids, position, mask, audio, cache=None):
        out = hidden(ids, position, mask, audio, cache)
        arrays = [x for layer in cache.layers for x in (layer.keys, layer.values)] if cache else []
        passes.append(SimpleNamespace(rows=len(mask), width=mask.shape[1], bytes=sum(
            x.nbytes for x in arrays), dtypes={x.dtype for x in arrays}))
        return out
    monkeypatch.setattr(model, "hidden", counted)
    return passes


def same(a, b):
    return a.sample.ids == b.sample.ids and a.sample.position == b.sample.position and \
        a.ended == b.ended and np.allclose(a.logprobs, b.logprobs, atol=1e-4)


TEXTS = ["<think>a <seg>0.5, 1.5</seg> b. Then <seg>1.0, 2.0</seg> c</think><answer>hum</answer>",
         "<think>look <seg>9, 10</seg> a <seg>1, 0</seg> b <seg>x</seg> c</seg> d</think>",
         "<answer>two Ünïcode ✓ 日本</answer>",
         "<think><seg>0, 1</seg><seg>3.5, 6.1</seg> both</think><answer>bell</answer>"]


def test_interleaved_rollout_hears_the_right_part_and_matches_training(model, monkeypatch):
    """Batched, cached, waiting rows: log-probs are those of a plain uncached pass over the ids."""
    waves, heard, hear = [noise(3.0 + i, i) for i in range(4)], [], model.hear
    prompts = asked(model, waves)
    write(monkeypatch, model, TEXTS)
    monkeypatch.setattr(model, "hear", lambda waves: heard.extend(waves) or hear(waves))
    rows = rollouts(model, prompts, waves, temperature=0.7, max_new_tokens=200)
    assert [r.text for r in rows] == TEXTS and echo.is_right(rows[2].text, "two ünïcode ✓ 日本")
    bad = ["outside the clip", "reversed", "malformed", "malformed"]
    assert [[(s.heard, s.reason) for s in r.segments] for r in rows] == [
        [(True, None)] * 2, [(False, reason) for reason in bad], [], [(True, None)] * 2]
    want = [waves[0][8000:24_000], waves[0][16_000:32_000], waves[3][:16_000], waves[3][56_000:]]
    assert len(heard) == 4 and all(any(torch.equal(h, w) for h in heard) for w in want)
    for r in rows:
        assert r.ended == "eos" and sum(r.sample.trained) == len(r.logprobs)
        logp = model.log_probs([r.sample], temperature=0.7)[0]
        assert (logp - torch.tensor(r.logprobs)).abs().max() < 1e-4
    written = spelled(model, rows[0].sample.ids[rows[0].n_prompt:-1])
    assert written == TEXTS[0].replace("</seg>", "</seg>" + "[audio]" * 25)
    answer = [model.piece(i) for i in model.ids(TEXTS[3])].index("bell")
    assert rows[3].confidence == pytest.approx(math.exp(rows[3].logprobs[answer]))


def test_rows_wait_for_each_other_but_not_for_the_last(model, monkeypatch):
    """8 rows with 0 to 7 segments: each as alone, in few passes, ended rows and padding dropped."""
    texts = ["".join(" the hum" * (20 if (i + k) % 8 == 7 else 1) + "<seg>0, 0.2</seg>" * (k < i)
                     for k in range(i + 1)) for i in range(8)]
    waves, more = [noise(2.0, i) for i in range(4)], dict(max_new_tokens=200, temperature=0.7)
    prompts = asked(model, waves)
    write(monkeypatch, model, texts)
    passes = count_passes(monkeypatch, model)
    rows = rollouts(model, prompts, waves, 2, **more)
    n_passes, last, longest = len(passes), passes[-1], max(len(r.logprobs) for r in rows)
    rounds = [[len(model.ids(x)) for x in re.findall("(?s).*?</seg>|.+$", t)] for t in texts]
    for_the_last = sum(max(r[k] for r in rounds if len(r) > k) for k in range(8))
    assert longest <= n_passes < 1.25 * longest < 0.7 * for_the_last
    assert last.rows == 1 and last.width < len(rows[7].sample.ids) + 10
    cached, computed = sum(r.cached for r in rows), sum(r.computed for r in rows)
    assert [r.cached for r in rows] == [len(r.sample.ids) - 1 for r in rows]
    assert cached < computed < 2 * cached
    split = rollouts(model, prompts, waves, 2, max_rows=3, **more)  # two rows at once
    for i, (r, s) in enumerate(zip(rows, split)):
        k = slice(i // 2, i // 2 + 1)
        alone = rollouts(model, prompts[k], waves[k], seeds=[i], **more)[0]
        assert r.text == texts[i] and len(r.heard) == i and same(r, alone) and same(r, s)


def test_inserted_audio_changes_what_follows_and_controls_differ(model, monkeypatch):
    wave, after = noise(3.0), {}
    prompts = asked(model, [wave])
    closed = len(model.ids(TEXTS[0].partition("</seg>")[0] + "</seg>"))
    write(monkeypatch, model, TEXTS)
    for how in ("segment", "random", "silence", "text"):
        more = {"reasoning": "text"} if how == "text" else {"insert": how}
        row = rollouts(model, prompts, [wave], **more)[0]
        inserted = row.sample.ids[row.n_prompt + closed:][:25] == [AUDIO] * 25
        assert inserted == bool(row.heard) == (how != "text")
        after[how] = tuple(row.logprobs[closed:closed + 3])
    assert len(set(after.values())) == 4 and row.segments[0].reason == "text reasoning"
    row = rollouts(model, prompts, [wave], max_new_tokens=closed)[0]
    assert (row.ended, row.segments[0].reason) == ("length", "no room left")
    assert row.sample.ids[-1] != AUDIO


def test_sampled_rollouts_do_not_depend_on_their_batch(model):
    waves = [noise(2.0 + i, i) for i in range(3)]
    prompts = asked(model, waves)
    together = rollouts(model, prompts, waves, group=2, seeds=range(6), max_new_tokens=30)
    for i, row in enumerate(together):
        k = slice(i // 2, i // 2 + 1)
        assert same(row, rollouts(model, prompts[k], waves[k], seeds=[i], max_new_tokens=30)[0])
    assert together[0].sample.ids != together[1].sample.ids


def test_greedy_equals_transformers_generate(model):
    wave = noise(2.0)
    prompts = asked(model, [wave])
    ours = rollouts(model, prompts, [wave], reasoning="text", temperature=0.0, max_new_tokens=20)[0]
    ids, _, mask, audio = model.tensors(prompts)
    theirs = model.decoder.generate(
        inputs_embeds=model.embed(ids, audio), attention_mask=mask, do_sample=False,
        max_new_tokens=20, eos_token_id=list(model.eos_ids), pad_token_id=0)[0].tolist()
    assert ours.sample.ids[ours.n_prompt:] == theirs


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_probabilities(model, temperature):
    """4,000 draws against the softmax itself."""
    hidden = 8 * torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    rows = [SimpleNamespace(draws=torch.Generator().manual_seed(i)) for i in range(4000)]
    with torch.no_grad():
        p = (model.decoder.lm_head(hidden)[0] / temperature).softmax(-1)
        tokens, logp = echo.sample_tokens(model, hidden.expand(4000, -1), rows, temperature)
    counts = torch.bincount(torch.tensor(tokens), minlength=len(p)) / 4000
    assert ((counts - p).abs() < 5 * (p / 4000).sqrt() + 1e-3).all() and p.max() > 0.02
    assert torch.allclose(torch.tensor(logp), p.log()[tokens], atol=1e-4)


# -------------------------------------------------------------------------------- rewards and GRPO

GOOD = "<think>a <seg>1, 2</seg> the hum.</think><answer>hum</answer>"


@pytest.mark.parametrize("text,heard,parts", [
    (GOOD, 1, (0.5, 0, 0.5, 0.5)), (GOOD, 0, (0.5, 0, 0.5, 0)), ("", 0, (0, 0, 0, 0)),
    (GOOD.replace("hum</answer>", "bell</answer>"), 1, (0.5, 0, 0, 0)),
    (GOOD.replace("</seg> the", "</seg> The"), 1, (0.5, -0.1, 0.5, 0.5)),    # behind a space, too
    (GOOD.replace("</seg> the", "</seg>The"), 1, (0.5, -0.1, 0.5, 0.5)),
    (GOOD.replace("</seg> the hum.", "</seg>"), 1, (0.5, -0.1, 0.5, 0.5)),   # nothing said
    (GOOD.replace("</seg> the hum.", "</seg>."), 1, (0.5, -0.1, 0.5, 0.5)),  # no word said
    (GOOD.replace("</seg> the", "</seg>, the"), 1, (0.5, 0, 0.5, 0.5)),
    (GOOD.replace("</seg>", "</seg><seg>2, 3</seg>"), 2, (0.5, -0.1, 0.5, 0.5)),
    (GOOD.replace("</seg> t", "</seg> <seg>2, 3</seg> T"), 2, (0.5, -0.2, 0.5, 0.5)),
    (GOOD.replace(" the hum.", "<seg>1, 2</seg>" * 6), 7, (0.5, -0.5, 0.5, 0.5)),
    ("a <seg>1, 2</seg>", 1, (0, -0.1, 0, 0)), ("<think>a</think> hum", 0, (0, 0, 0, 0)),
    ("<think>a</think><answer>Hum.</answer>", 0, (0.5, 0, 0.5, 0)),
    ("<think>a</think><answer>hum</answer><answer>bell</answer>", 0, (0, 0, 0, 0)),
    ("<answer>hum</answer><think>a</think>", 0, (0, 0, 0.5, 0)),
    ("<think>a<think>b</think><answer>hum</answer>", 0, (0, 0, 0.5, 0))])
def test_rewards_by_hand(text, heard, parts):
    segments = [Segment("1, 2", 1, 2, heard=True)] * heard + [Segment("x", reason="malformed")]
    row = Rollout(Sample(), None, None, segments=segments, text=text, confidence=0.8)
    got = echo.REWARDS["paper"](row, "hum")
    assert list(got) == ["format", "consistency", "accuracy", "segment"]
    assert tuple(got.values()) == pytest.approx(parts)
    want = 0.5 * (1 - 0.2 ** 2) if parts[2] else -0.5 * 0.8 ** 2
    got = echo.REWARDS["confidence"](row, "hum")
    assert tuple(got.values()) == pytest.approx((*parts[:2], want, want if parts[3] else 0))


def test_advantages_and_flat_groups():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.5, 0.5, 0.5, 0.5]])
    got = echo.group_advantages(rewards)
    assert got[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-3) and got[1].tolist() == [0] * 4
    assert got[2].tolist() == pytest.approx([1.732, -0.577, -0.577, -0.577], abs=1e-2)


def test_micro_batches_cover_everything_within_budget():
    batches = echo.micro_batches([Sample(ids=[0] * n) for n in (3, 9, 2, 30, 5, 5, 5)], 20)
    assert batches == [[0, 1], [2], [3], [4, 5, 6]]


def settings(**more):
    defaults = {"mini_batches": 1, "dtype": "fp32", "tokens_per_batch": 16_384}
    return train_rl.Settings(**defaults | more)


class Watched(echo.Training):
    """A training whose update keeps the gradients and changes nothing."""
    def update(self, lr):
        self.gradients = {k: p.grad.clone() for k, p in self.trained.items() if p.grad is not None}


@pytest.mark.parametrize("budget", [300, 16_384])
def test_grpo_update_against_a_plain_double_loop(model, tmp_path, monkeypatch, budget):
    """One update in micro-batches, against tokens one by one: gradient and metrics."""
    policy, reference, how = copy.deepcopy(model), copy.deepcopy(model), settings(temperature=0.7)
    with torch.no_grad():  # a reference and an older policy that differ
        for p in reference.decoder.parameters():
            p += 1e-3
    waves, adv = [noise(2.0 + i, i) for i in range(4)], torch.tensor([1.0, -0.5, 0.3, 2.0])
    write(monkeypatch, model, TEXTS)
    responses = rollouts(model, asked(model, waves), waves, temperature=0.7)
    for r in responses:
        r.logprobs = [x + 0.3 * (-1) ** t for t, x in enumerate(r.logprobs)]
    how.tokens_per_batch, training = budget, Watched(tmp_path, echo.prepare(policy, how), {})
    got = echo.grpo_update(training, policy, reference, responses, adv, how, 1.0)
    total, want, plain = 0.0, np.zeros(5), copy.deepcopy(policy)
    plain.zero_grad()
    for r, a in zip(responses, adv):  # mean over responses of the mean over tokens
        ref, = reference.log_probs([r.sample], 0.7)
        for p, old, base in zip(plain([r.sample], 0.7), r.logprobs, ref):
            ratio, k3 = (p - old).exp(), (base - p).exp() - (base - p) - 1
            bounded = ratio.clamp(0.8, 1.2)
            loss = -min(ratio * a, bounded * a) + 0.04 * k3
            total = total + loss / len(r.logprobs) / 4
            parts = loss.item(), k3.item(), bounded * a < ratio * a, -old, abs(p.item() - old)
            want += [float(x) / len(r.logprobs) / 4 for x in parts]
    total.backward()
    assert list(got) == ["loss", "kl", "clip_share", "entropy", "logp_gap"]
    assert list(got.values()) == pytest.approx(want, abs=1e-4) and (want[1:] > 0).all()
    for k, p in plain.named_parameters():
        assert k not in training.gradients or (training.gradients[k] - p.grad).abs().max() < 1e-4, k


@pytest.mark.parametrize("flat,updated", [("keep", 8), ("drop", 4), ("drop", 0)])
def test_flat_groups_in_the_update(model, data, tmp_path, monkeypatch, flat, updated):
    """Two questions of four responses: both groups are flat, or the second has an advantage."""
    rewards, seen = iter([1.0] * 4 + [1.0, 0.0, 0.0, 0.0] if updated else [1.0] * 8), []
    monkeypatch.setitem(echo.REWARDS, "mine", lambda *a: {"mine": next(rewards)})
    update = train_rl.grpo_update
    monkeypatch.setattr(train_rl, "grpo_update", lambda *a: seen.append(a) or update(*a))
    how = settings(reward="mine", flat=flat, steps=9, questions=2, group=4, lr=1e-3,
                   max_new_tokens=5)
    policy = echo.prepare(copy.deepcopy(model), how)
    before, training = copy.deepcopy(policy.state_dict()), echo.Training(tmp_path, policy, {})
    train_rl.grpo_step(training, policy, model, echo.read_questions(data / "rl.jsonl"), how)
    assert len(seen[0][3]) == len(seen[0][4]) == updated
    assert all(map(torch.equal, before.values(), policy.state_dict().values())) == (not updated)
    assert log_of(tmp_path)[0]["flat_groups"] == (0.5 if updated else 1)


def test_response_metrics_by_hand():
    heard = [Segment("", a, b, heard=True) for a, b in ((0, 2), (1, 3), (4, 4.3), (0, 1))]
    bad = Segment("x", reason="malformed")
    rows = [Rollout(Sample(ids=[5, AUDIO, AUDIO]), None, None, logprobs=[0.0] * 10, text=GOOD,
                    ended="eos", segments=[*heard[:3], bad]),
            Rollout(Sample(), None, None, logprobs=[0.0] * 20, ended="length", segments=heard[3:],
                    cached=30, computed=40)]
    want = {"segments": 2, "segment_s": 5.3 / 4, "short_segments": 1 / 4, "overlap": 1 / 5.3,
            "listened_once": 1, "listened_twice": 0.5, "truncated": 0.5, "no_answer": 0.5,
            "length": 15, "audio_tokens": 1, "padding": 0.25, "rejected_malformed": 0.2}
    want |= {f"rejected_{x.replace(' ', '_')}": 0 for x in echo.REASONS[1:]}
    assert generate.response_metrics(rows) == pytest.approx(want)
    assert generate.response_metrics([]) == dict.fromkeys(want, 0)


# ------------------------------------------------------------------ pretrained parts, on stand-ins

@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Random-weight Qwen2s of Qwen2.5-0.5B's ratios, by tied heads or not. As there, "</seg>" is
    several pieces, and ">," or "></" may hold its end."""
    bpe, folders = Tokenizer(models.BPE()), {}
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["<seg>1, 2</seg>, the hum</seg></think><answer>two", "How many pulses? Choose"] * 3
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<|endoftext|>", "<|im_end|>"]))
    for tied in (True, False):
        folders[tied] = tmp_path_factory.mktemp("qwen")
        torch.manual_seed(1)
        decoder = Qwen2ForCausalLM(Qwen2Config(
            vocab_size=bpe.get_vocab_size() + 3, hidden_size=56, intermediate_size=304,
            num_hidden_layers=3, num_attention_heads=14, num_key_value_heads=2,
            initializer_range=0.1, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=1))
        decoder.generation_config.eos_token_id = [1, 7]
        decoder.save_pretrained(folders[tied])
        PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>",
                                pad_token="<|endoftext|>").save_pretrained(folders[tied])
    return folders


def pretrained(folder, train="decoder", dtype="fp32", **config):
    config = {k: v for k, v in MICRO.items() if k.startswith("encoder")} | config
    torch.manual_seed(0)
    return echo.prepare(echo.build(Config(decoder=str(folder), **config)),
                        settings(train=train, dtype=dtype))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("train", ["decoder", "last-1", "projector"])
def test_pretrained_decoder_keeps_its_vocabulary_and_writes_tags(qwen, monkeypatch, tied, train):
    model, plain = pretrained(qwen[tied], train), Qwen2ForCausalLM.from_pretrained(qwen[tied])
    table, head = model.decoder.get_input_embeddings().weight, model.decoder.lm_head.weight
    assert torch.equal(table, plain.model.embed_tokens.weight) and (table is head) == tied
    assert torch.equal(head, plain.lm_head.weight) and model.eos_ids == {1, 7}
    assert len(model.tokenizer) == len(AutoTokenizer.from_pretrained(qwen[tied]))
    layers = {"decoder": "012", "last-1": "2", "projector": ""}[train]
    for name, p in model.named_parameters():
        want = re.match(rf"projector|decoder\.model\.(layers\.[{layers}-]\.|norm)", name)
        assert p.requires_grad == bool(want and (layers or "norm" not in name)), name
    texts = ["<think>a <seg>0, 0.2</seg>, it <seg>0, .4</seg></think><answer>two</answer>",
             "a <seg>9, 10</seg>, <seg>0, 0.2</seg> b"]
    want = ["<think>a <seg>0, 0.2</seg>,{0} it <seg>0, .4</seg></{0}{0}think><answer>two</answer>",
            "a <seg>9, 10</seg>, <seg>0, 0.2</seg>{0} b"]
    pieces, wave = [model.piece(i) for i in model.ids(texts[0])], noise(1.0)
    assert "</seg>" not in pieces and ">," in pieces and "></" in pieces
    write(monkeypatch, model, texts)
    for k, r in enumerate(rollouts(model, asked(model, [wave]), [wave], group=2)):
        new, on = r.sample.ids[r.n_prompt:], r.sample.trained[r.n_prompt:]
        assert [i for i, sampled in zip(new, on) if sampled] == [*model.ids(texts[k]), 1]
        assert spelled(model, new[:-1]) == want[k].format("[audio]" * 5) and r.text == texts[k]
        assert [s.heard for s in r.segments] == [k == 0, True]
        assert torch.allclose(model.log_probs([r.sample])[0], torch.tensor(r.logprobs), atol=1e-4)


@pytest.mark.parametrize("tied,train", [(True, "decoder"), (False, "last-1"), (True, "projector")])
def test_bf16(qwen, monkeypatch, tmp_path, tied, train):
    """Frozen matrices are bf16, the rest fp32; before an update the KL is 0 and the ratio 1."""
    exact = pretrained(qwen[tied]).hear([noise(3.0)])[0]
    reference = echo.prepare(pretrained(qwen[tied]), settings(train="none", dtype="bf16"))
    policy, wave = pretrained(qwen[tied], train, "bf16"), noise(3.0)
    for model in (policy, reference):
        for p in [p for p in model.decoder.parameters() if p.dim() == 2 or p.requires_grad]:
            assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16)
        assert model.decoder.model.rotary_emb.inv_freq.dtype == torch.float32
        assert (model.decoder.lm_head.weight is model.decoder.model.embed_tokens.weight) == tied
    with policy.autocast():
        assert torch.equal(policy.hear([wave])[0], exact)
    with monkeypatch.context() as patch:  # logits that bf16 would round by up to 0.06
        hidden = (20 * torch.randn(1, 2, 56)).bfloat16().float()
        patch.setattr(policy, "hidden", lambda *a: hidden)
        want = F.linear(hidden[0, :1], policy.decoder.lm_head.weight.float()).log_softmax(-1)
        assert (policy([Sample([4, 5], [False, True], [0, 1])]) - want[0, 5]).abs() < 1e-3
    prompts = asked(policy, [wave])
    prompts[0].position[6:] = [at + 2000 for at in prompts[0].position[6:]]  # rotary angles far out
    passes = count_passes(monkeypatch, policy)
    write(monkeypatch, policy, ["a <seg>0, 1</seg> two pulses" + " <hum>" * i for i in range(4)])
    responses = rollouts(policy, prompts, [wave], 4, max_new_tokens=100)
    samples, adv = [r.sample for r in responses], torch.tensor([1.0, -0.5, 0.3, 2.0])
    assert all(p.dtypes == {torch.bfloat16} for p in passes) and all(r.heard for r in responses)
    assert all(map(torch.equal, policy.log_probs(samples), reference.log_probs(samples)))
    training = Watched(tmp_path, policy, {})
    for n in (1, 2):
        how = settings(mini_batches=n)
        got = echo.grpo_update(training, policy, reference, responses, adv, how, 1.0)
        assert got["kl"] == pytest.approx(0, abs=0 if n == 1 else 1e-5)  # other padding rounds so
        assert got["clip_share"] == 0 < got["logp_gap"] < 0.1
        assert got["loss"] == pytest.approx(-adv.mean().item(), abs=1e-6 if n == 1 else 1e-2)


def test_bf16_of_a_tiny_decoder(model):
    policy = echo.prepare(copy.deepcopy(model), settings(dtype="bf16"))
    reference = echo.prepare(copy.deepcopy(model), settings(dtype="bf16", train="none"))
    assert torch.equal(*(m.log_probs([dialogue(model)])[0] for m in (policy, reference)))
    assert not echo.set_precision(copy.deepcopy(model), "auto").bf16


@pytest.fixture(scope="session")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    torch.manual_seed(2)
    WhisperModel(WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, vocab_size=100,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)).save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("rate", [0.0, 2.0])
def test_whisper_encoder(tokenizer, whisper, rate):
    """Windows of 30 s, padding cut away, 25 tokens a second; a batch equals one by one."""
    model = micro(tokenizer, encoder=str(whisper), first_listen_rate=rate)
    waves = [noise(s, i) for i, s in enumerate((0.2, 3.0, 31.0))]
    full, first = model.hear(waves), model.hear(waves, True)
    assert [len(t) for t in full] == [5, 75, 775]
    assert [len(t) for t in first] == ([1, 6, 62] if rate else [5, 75, 775])
    for wave, tokens in zip(waves, full):
        assert (model.hear([wave])[0] - tokens).abs().max() < 1e-4
    for window, tokens in ((waves[1], full[1]), (waves[2][480_000:], full[2][750:])):
        heard = model.encoder.extractor(window.numpy(), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            want = model.encoder.whisper(heard.input_features).last_hidden_state[0]
        assert (tokens - want.view(750, 2, -1).mean(1)[:len(tokens)]).abs().max() < 1e-4
    ends = [(math.floor(i * 12.5), math.ceil((i + 1) * 12.5)) for i in range(6)]
    want = torch.stack([full[1][a:b].mean(0) for a, b in ends]) if rate else full[1]
    assert (first[1] - want).abs().max() < 1e-4


class LoudnessEncoder(torch.nn.Module):
    """The README's "your own encoder": loudness of each 40 ms."""
    TOKENS_PER_SECOND, dim = 25, 4

    def forward(self, waves, first_listen):
        padded = [F.pad(w, (0, -len(w) % 640)).view(-1, 640) for w in waves]
        return [w.abs().mean(1, keepdim=True).repeat(1, 4) for w in padded]


def test_your_own_encoder(model, monkeypatch):
    config, wave = Config(first_listen_rate=0.0), torch.arange(2.0).repeat_interleave(16_000)
    mine = echo.Echo(config, LoudnessEncoder(), model.decoder, model.tokenizer)
    write(monkeypatch, mine, TEXTS)
    row = rollouts(mine, asked(mine, [wave]), [wave])[0]
    heard = torch.cat(row.sample.audio)[:, 0].round().int().tolist()
    assert heard == [0] * 25 + [1] * 25 + [0] * 13 + [1] * 12 + [1] * 25


@pytest.mark.parametrize("module", [train_sft, train_rl])
def test_settings_follow_the_decoder(module, monkeypatch, capsys):
    first, *others = module.Settings.PRETRAINED
    monkeypatch.setattr(sys, "argv", ["script", f"--{first}", "7"])  # what is given stays
    for decoder, own in (("tiny", {}), ("some/qwen", module.Settings.PRETRAINED)):
        settings = echo.parse_settings(module.Settings, "")
        echo.follow_decoder(settings, decoder)
        assert settings == module.Settings(**own | {first: 7})
        said = capsys.readouterr().out
        assert all(f"{name} {own[name]}" in said for name in others) if own else said == ""


# -------------------------------------------------------------------------------------------- data

def test_judge_catches_every_planted_fault():
    kinds, faults = list(make_data.SYNTHETIC), make_data.QA_FAULTS | make_data.COT_FAULTS
    assert {"take_back", "embellish"} < faults.keys() and len(faults) == 14
    for i in range(60):
        rng = np.random.default_rng([3, i])
        _, events = make_data.synthesise(rng)
        for category in make_data.CATEGORIES:
            row = make_data.write_row(category, events, rng)
            assert make_data.judge_qa(row, events) is make_data.judge_cot(row, events) is None
            assert row["answer"] in row["multi_choice"] and len(set(row["multi_choice"])) == 4
            for name, plant in faults.items():
                bad = row | plant(row, events, kinds, rng)
                qa = make_data.judge_qa(bad, events)
                assert bool(qa) == (name in make_data.QA_FAULTS), (name, bad)
                assert qa or make_data.judge_cot(bad, events), (name, bad)
            for a, b in (("<think>", "<think>Well. "), ("</think>", " So be it.</think>"),
                         (" <seg>", ", so <seg>"), ("</seg> the", "</seg> surely the")):
                assert make_data.judge_cot(row | {"cot": row["cot"].replace(a, b, 1)}, events)


def test_same_seed_same_bytes_and_no_shared_clips(data, tmp_path):
    good("make_data", "--out", tmp_path / "again", "--train-clips", 24, "--test-clips", 2)
    files = sorted(p.relative_to(data) for p in data.rglob("*") if p.is_file())
    assert len(files) == 31
    assert all((data / f).read_bytes() == (tmp_path / "again" / f).read_bytes() for f in files)
    good("make_data", "--out", tmp_path / "b", "--train-clips", 2, "--test-clips", 2, "--seed", 1)
    train = {p.read_bytes() for p in (data / "audio/train").iterdir()}
    assert (tmp_path / "b/audio/train/00000.wav").read_bytes() not in train
    assert not train & {p.read_bytes() for p in (data / "audio/test").iterdir()}
    sft, rl = (echo.read_rows(data / f"{name}.jsonl") for name in ("sft", "rl"))
    assert set(rl[0]) == {"id", "audio_path", "question", "multi_choice", "answer"}
    assert set(sft[0]) == set(rl[0]) | {"cot"}


def test_recorded_sounds(tmp_path, monkeypatch):
    """A folder of recordings for each kind; what is held out is heard in the test alone."""
    folder, out, kinds = tmp_path / "sounds", tmp_path / "data", set()
    for k, name in enumerate(("Big Drum", "tabla_na", "HISS", "gong", "e3")):
        (folder / name).mkdir(parents=True)
        kinds.add(re.sub("[ _]", "-", name.lower()))
        for i in range(4):
            sound = noise(0.3 + 0.5 * i, 10 * k + i).numpy().clip(-1, 1)
            (folder / name / f"{i}.WAV").write_bytes(make_data.wav_bytes(sound))
    train, test = make_data.read_sounds(folder, 0.5, 0)
    assert set(train) == set(test) == kinds
    for kind in kinds:
        a, b = ({sound.tobytes() for sound in split[kind]} for split in (train, test))
        assert len(a) == len(b) == 2 and not a & b
    assert all(len(s) == 4 for split in make_data.read_sounds(folder, 0, 0) for s in split.values())
    used, real = [], make_data.make_split  # each split gets its own recordings
    monkeypatch.setattr(make_data, "make_split", lambda *a: used.append(a[1::2]) or real(*a))
    flags = ["--sounds", folder, "--out", out, "--train-clips", 6, "--test-clips", 2]
    good("make_data", *flags, "--hold-out", 0.25, "--qa-faults", 0, "--cot-faults", 0)
    assert [(name, len(sounds["gong"])) for name, sounds in used] == [("train", 3), ("test", 1)]
    assert len(echo.read_rows(out / "sft.jsonl")) == 18  # no row is broken
    clips = echo.read_rows(out / "clips.jsonl")
    assert {e["kind"] for clip in clips for e in clip["A4_events"]} == kinds
    (folder / "big_drum").mkdir()
    assert "kind 'big-drum'" in mistake("make_data", *flags)
    (folder / "big_drum").rmdir()
    shutil.move(folder / "gong", tmp_path)
    assert "4 folders" in mistake("make_data", *flags)
    (folder / "gong").mkdir()
    assert "0 WAV files" in mistake("make_data", *flags)
    shutil.copy(folder / "e3/0.WAV", folder / "gong")
    assert "needed: at least 2" in mistake("make_data", *flags, "--hold-out", 0.25)


ROW = {"question": "q", "answer": "a", "audio_path": "x.wav", "multi_choice": ["a", "b"]}


@pytest.mark.parametrize("content,says", [
    (ROW | {"question": ""}, "row 1: no text under 'question'"),
    (ROW | {"answer": 3}, "row 1: no text under 'answer'"),
    (ROW | {"audio_path": 3}, "row 1: no 'audio_path'"),
    (ROW | {"multi_choice": "ab"}, "row 1: no 'multi_choice'"),
    (ROW | {"multi_choice": [1, 2]}, "row 1: no 'multi_choice'"),
    (ROW | {"answer": "c"}, "row 1: the answer 'c' is not among the choices"),
    (json.dumps(ROW) + '\n{"question": \n', "row 2: not JSON"), ("[1]", "row 1"),
    ('[{"question": "q"', "line 1: not JSON"), ("", "no rows"), ("[]", "no rows"),
    (b"\xff\xfe{\0}\0", "byte 0: not UTF-8"), (b'{"question": "\xe9"}', "byte 14: not UTF-8")])
def test_broken_rows_are_one_line(tmp_path, content, says):
    content = json.dumps(content) if isinstance(content, dict) else content
    (tmp_path / "r.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    error = error_of(read_questions, tmp_path / "r.jsonl")
    assert says in error and "r.jsonl" in error


def test_rows_as_published(tmp_path):
    """A byte order mark, MMAU's lists of categories, no answers in a benchmark; 3 is no answer."""
    file, row = tmp_path / "rows.json", {k: v for k, v in ROW.items() if k != "answer"}
    text = json.dumps([ROW | {"category": ["Order", "Music"]}])
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    q, = read_questions(file)
    assert (q.category, q.answer, q.path) == ("Order, Music", "a", tmp_path / "x.wav")
    file.write_text(json.dumps([row]))
    q, = read_questions(file, "/r", needs=())
    assert (q.category, q.answer, q.path) == ("all", None, Path("/r/x.wav"))
    file.write_text(json.dumps([row | {"answer": 3}]))
    assert "'answer' is not a text: 3" in error_of(read_questions, file, needs=())


def test_clips_are_kept_within_bounds(model, tmp_path, monkeypatch):
    files, read, bound = [tmp_path / f"{i}.wav" for i in range(4)], [], 3 * 2 * 32 * 4
    monkeypatch.setattr(train_sft, "load_audio", lambda *a: read.append(a) or load_audio(*a))
    for i, file in enumerate(files):
        file.write_bytes(make_data.wav_bytes(noise(1.0, i)))
    clips, roomy = train_sft.Clips(model, keep_bytes=bound), train_sft.Clips(model)
    for file in files * 2:
        wave = load_audio(file)
        assert torch.equal(clips(file), model.hear([wave], True)[0])
        assert torch.equal(clips(file, 0.2, 0.6), model.hear([wave[3200:9600]])[0])
    assert sum(features.nbytes for features in clips.kept.values()) <= bound
    read.clear()
    assert torch.equal(roomy(files[0]), roomy(files[0])) and len(read) == 1


# ------------------------------------------------------------------------------------- checkpoints

def test_save_and_load_round_trip(model, qwen, whisper, tmp_path):
    for name, saved in (("tiny", model), ("qwen", pretrained(qwen[False], encoder=str(whisper)))):
        save(saved, tmp_path / name)
        again = load(tmp_path / name)
        assert again.config == saved.config and again.eos_ids == saved.eos_ids
        assert torch.equal(*(m.log_probs([dialogue(m)])[0] for m in (again, saved)))
        text = "<think>I look for the hum <seg>1.0, 2.0</seg>, the ✓"
        assert again.ids(text) == saved.ids(text)
    save(model, tmp_path / "tiny")  # over itself
    assert sorted(p.name for p in tmp_path.iterdir()) == ["qwen", "tiny"]
    (tmp_path / "tiny/echo.safetensors").write_bytes(b"half")
    assert "broken checkpoint" in error_of(load, tmp_path / "tiny")
    assert "no Echo checkpoint" in error_of(load, tmp_path)


# ------------------------------------------------------------------------- the scripts, end to end

STEPS = ["--encoder-steps", 4, "--encoder-clips", 8, "--caption-steps", 3, "--instruct-steps", 3,
         "--align-batch", 2, "--log-every", 1,
         "--sft-steps", 80, "--sft-batch", 8, "--sft-lr", 2e-3]  # enough to write tags and answers
RL = ["--steps", 3, "--questions", 2, "--group", 4, "--max-new-tokens", 48, "--eval-questions", 3,
      "--eval-every", 2]


def sft(data, out, *more, test="none"):
    return ["train_sft", "--data", data / "sft.jsonl", "--clips", data / "clips.jsonl",
            "--out", out, "--test", test, *STEPS, *more]


def rl(data, model, out, *more, test="none"):
    return ["train_rl", "--model", model, "--data", data / "rl.jsonl", "--out", out, "--test", test,
            *RL, *more]


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(folder):
    """The log of a run without what depends on the machine."""
    free = re.compile("seconds|decoding_share|.*_per_s|.*padding")
    return [{k: v for k, v in e.items() if not free.fullmatch(k)} for e in log_of(folder)]


def weights(folder):
    parts = ("echo.safetensors", "model.safetensors")
    return {k: v for part in parts for k, v in echo.load_file(folder / "model" / part).items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="session")
def trained(data):
    """All stages at micro size, by the scripts: the folder of their folders."""
    runs = data.parent / "runs"
    good(*sft(data, runs, test=data / "test.jsonl"))
    good(*rl(data, runs / "sft", runs / "rl", test=data / "test.jsonl"))
    return runs


def test_training_scripts(data, trained, tmp_path, monkeypatch):
    steps = [e for e in log_of(trained / "rl") if "reward" in e]
    assert [e["step"] for e in steps] == [1, 2, 3]
    for entry in steps:
        parts = [entry[k] for k in ("format", "consistency", "accuracy", "segment")]
        assert entry["reward"] == pytest.approx(sum(parts), abs=1e-4)
        assert all(math.isfinite(v) for v in entry.values())
    assert max(e["segments"] for e in steps) > 0 and max(e["kl"] for e in steps) > 0
    evaluated = [e for e in log_of(trained / "rl") if "eval_accuracy" in e]
    assert [e["step"] for e in evaluated] == [0, 2, 3] and "eval_count_after" in evaluated[0]
    assert "eval_accuracy" in log_of(trained / "sft")[-1]
    assert (trained / "rl/report.html").is_file() and not (trained / "rl/saves").exists()
    stages = [weights(trained / stage) for stage in ("encoder", "base", "sft", "rl")]
    for name in [k for k in stages[0] if k.startswith("encoder.")]:  # frozen after its own stage
        assert all(torch.equal(stages[0][name], stage[name]) for stage in stages), name
    for name in ("projector.bias", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        assert not any(torch.equal(a[name], b[name]) for a, b in zip(stages[1:], stages[2:]))
    flags = sft(data, trained, test=data / "test.jsonl")
    assert good(*flags).count("already trained") == 3  # or trained again, alike, if told so
    flags = rl(data, trained / "sft", trained / "rl", test=data / "test.jsonl")
    assert "already trained" in good(*flags, "--save-every", 7)
    assert "was begun with lr = " in mistake(*flags, "--lr", 1)
    monkeypatch.setitem(echo.REWARDS, "brief", lambda r, answer: {"brief": -len(r.logprobs)})
    good(*rl(data, trained / "sft", tmp_path / "rl", "--reward", "brief", "--steps", 1))
    entry = log_of(tmp_path / "rl")[0]
    assert entry["reward"] == entry["brief"] == -entry["length"]
    shutil.copytree(trained / "base", tmp_path / "base")
    assert "nowhere: no such" in mistake(*sft(data, tmp_path, "--stage", "sft", test="nowhere"))
    short = sft(data, tmp_path, "--stage", "sft", "--sft-steps", 3)
    assert "step 3" in good(*short)  # nothing was trained, so that other settings are no mistake
    (tmp_path / "sft/mine.txt").write_text("")
    assert "step 2" in good(*short, "--retrain", "--sft-steps", 2)
    assert len(log_of(tmp_path / "sft")) == 2 and (tmp_path / "sft/mine.txt").is_file()


def test_every_metric_is_defined(trained):
    runs = [log_of(trained / run) for run in ("encoder", "base", "sft", "rl")]
    logged = {generate.plain_name(k) for log in runs for entry in log for k in entry} - {"step"}
    assert not logged - generate.METRICS.keys() and len(logged) > 30


def test_generate_on_a_foreign_clip(data, trained, tmp_path, monkeypatch):
    """Another rate, stereo: an answer in JSON, and the stream."""
    t = np.arange(3 * 44_100)[:, None] / 44_100
    raw = (8000 * np.sin(2 * np.pi * t * [300, 500])).astype("<i2").tobytes()
    (tmp_path / "my clip.wav").write_bytes(wav(raw, 44_100, 2))
    flags = ["generate", tmp_path / "my clip.wav", "Which sound?", "--choices", "bell", "a hiss",
             "--model", trained / "rl"]
    assert set(json.loads(good(*flags, "--json"))) == {"answer", "response", "segments", "ended"}
    said = good(*flags)
    assert "answer:" in said and "Which sound? bell, a hiss" in said and "(3.0 s)" in said
    monkeypatch.chdir(data.parent)  # without a clip: a held-out one of the toy
    assert "truth:" in good("generate")


def test_benchmark_files(data, trained, tmp_path, monkeypatch):
    """MMAR and MMAU rows come back whole with the evaluators' keys; broken audio is named and
    counted; an interrupted run goes on, with the same settings alone. A row's draws are its own."""
    ours = [{"id": str(i), "question": r["question"], "choices": r["multi_choice"], "task": "sound",
             "answer": r["answer"], "audio_path": r["audio_path"]}
            for i, r in enumerate(echo.read_rows(data / "test.jsonl")[:5])]
    mmar = [row | {"modality": "x", "sub-category": "y"} for row in ours]
    mmar[2]["audio_path"], mmar[3]["question"] = "./audio/gone.wav", "q " * 60_000
    (tmp_path / "mmar.json").write_text(json.dumps(mmar))
    mmau = json.dumps(ours).replace("audio_path", "audio_id")
    (tmp_path / "mmau.json").write_text(mmau)

    def flags(name, out):
        return ["generate", "--benchmark", tmp_path / f"{name}.json", "--audio-root", data,
                "--output", tmp_path / out, "--model", trained / "rl", "--batch", 2,
                "--temperature", 1]
    code, out, err = run(*flags("mmar", "out.json"))
    assert code == 1 and "2 of 5 rows" in err and "gone.wav" in out and "shorten the" in out
    done = json.loads((tmp_path / "out.json").read_text())
    assert [{k: v for k, v in d.items() if k in m} for d, m in zip(done, mmar)] == mmar
    for row in done:
        said = echo.extract_answer(row["response"]) or ""
        assert row["answer_prediction"] == row["model_output"] == said
    assert ["error" in row for row in done] == [False, False, True, True, False]
    assert not (tmp_path / "out.json.part").exists()
    good(*flags("mmau", "whole.json"))
    real, part = generate.answer_batch, tmp_path / "again.json.part"

    def answer_batch(model, questions, settings, first):  # Ctrl-C in the second batch
        if questions[0].row["id"] == "2":
            raise KeyboardInterrupt
        return [row | {"mark": 1} for row in real(model, questions, settings, first)]
    monkeypatch.setattr(generate, "answer_batch", answer_batch)
    assert run(*flags("mmau", "again.json"))[0] == 130
    monkeypatch.setattr(generate, "answer_batch", real)
    part.write_text(part.read_text() + '{"id": "2", "audio')  # and a half-written row
    assert "max_new_tokens" in mistake(*flags("mmau", "again.json"), "--max-new-tokens", 9)
    assert "audio_root" in mistake(*flags("mmau", "again.json"), "--audio-root", "/")
    good(*flags("mmau", "again.json"), "--batch", 3)
    again, whole = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("again", "whole"))
    assert [row.get("mark") for row in again] == [1, 1, None, None, None]
    for row, a, b in zip(whole, again, done):
        assert row["response"] == a["response"] and b["response"] in ("", row["response"])


def test_interval_of_a_share():
    """The ends of Wilson's interval are the shares from which p is 1.96 standard errors away."""
    for right, n in ((0, 5), (5, 5), (0, 600), (600, 600), (413, 600)):
        (low, high), p = generate.interval(right, n), right / n
        assert 0 <= low <= p <= high <= 1 and math.copysign(1, low) == 1
        for end in {low, high} - {0.0, 1.0}:
            assert abs(p - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / n), abs=1e-6)


@pytest.mark.parametrize("name,args,says", [
    ("generate", ["nowhere.wav", "q?"], "nowhere.wav: no such file"),
    ("generate", ["nowhere.wav"], "no question"), ("generate", ["a.wav", "q " * 60_000], "shorten"),
    ("generate", ["--model", "nowhere"], "no Echo checkpoint"),
    ("generate", ["--report", "nowhere"], "no log.jsonl"),
    ("train_rl", ["--steps", "many"], "argument --steps: invalid int value: 'many'"),
    ("train_rl", ["--reward", "nothing"], "--reward nothing: must be one of"),
    ("train_rl", ["--flat", "skip"], "--flat skip: must be one of keep, drop"),
    ("train_rl", ["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ("train_rl", ["--data", "a.wav"], "not UTF-8"),
    ("train_rl", ["--temperature", "0"], "--temperature 0.0: must be above 0"),
    ("train_rl", ["--questions", "3"], "multiple of --mini-batches x processes"),
    ("train_sft", ["--stage", "third"], "--stage third: must be"),
    ("train_sft", ["--dtype", "fp16"], "--dtype fp16: must be"),
    ("train_sft", ["--first-listen-rate", "3"], "--first-listen-rate 3.0: must divide 100"),
    ("train_sft", ["--train", "all", "--stage", "align"], "--train all: must be"),
    ("train_sft", ["--no-share-position", "--stage", "align"], "with share_position = True, now"),
    ("train_sft", ["--clips", "bare.jsonl", "--out", "new"], "row 1: 'A4_events' without kind"),
    ("train_sft", ["--clips", "few.jsonl", "--out", "new"], "few.jsonl: 1 kinds of sound"),
    ("train_sft", ["--decoder", "no/qwen", "--out", "new"], "neither a folder here nor reachable"),
    ("train_sft", ["--device", "cuda:9"], "--device cuda:9"),
    ("make_data", ["--qa-faults", "2"], "--qa-faults and --cot-faults"),
    ("make_data", ["--sounds", "nowhere"], "--sounds nowhere: 0 folders")])
def test_a_users_mistake_is_one_line(data, trained, tmp_path, monkeypatch, name, args, says):
    """The flags that the mistake is not about are good ones."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("a.wav").write_bytes(wav(b"\xff\x01" * 16_000))
    event = {"kind": "hum", "start_s": 0.0, "end_s": 1.0}
    for file, events in (("bare", [event]), ("few", [event | {"pulses": 2}])):
        Path(f"{file}.jsonl").write_text(json.dumps({"audio_path": "a.wav", "A4_events": events}))
    shutil.copytree(trained / "encoder", "runs/encoder")
    flags = {"make_data": ["make_data"], "generate": ["generate", "--model", trained / "rl"],
             "train_sft": sft(data, "runs"), "train_rl": rl(data, trained / "sft", "rl")}[name]
    assert says in mistake(*flags, *args)


def test_pretrained_stages_end_to_end(data, qwen, whisper, tmp_path):
    """Both stages and use on the stand-ins, in bf16; what is frozen stays, but for its rounding."""
    bf16, model = ["--dtype", "bf16", "--checkpointing", "--tokens-per-batch", 900], tmp_path / "rl"
    said = good(*sft(data, tmp_path, "--decoder", qwen[True], "--encoder", whisper, "--train",
                     "last-1", "--first-listen-rate", 0, "--sft-steps", 2, *bf16))
    assert "for a pretrained decoder: " in said and "align_lr 5e-05" in said
    before, after = (weights(tmp_path / stage) for stage in ("encoder", "sft"))
    changed = {k for k in before if not torch.equal(before[k].bfloat16(), after[k].bfloat16())}
    assert any(".layers.2." in k for k in changed)
    assert all(re.search(r"layers\.2\.|model\.norm|projector", k) for k in changed)
    config = load(tmp_path / "sft").config
    assert config.max_new_tokens == 512 and "Think step-by-step" in config.prompt
    published = echo.read_rows(data / "rl.jsonl")
    (tmp_path / "rl.jsonl").write_text(json.dumps(published))  # a list, elsewhere than the audio
    good(*rl(tmp_path, tmp_path / "sft", model, "--audio-root", data, "--max-new-tokens", 9, *bf16))
    clip = ["generate", data / "audio/test/00000.wav", "What?", "--choices", "a", "b", "--json"]
    assert json.loads(good(*clip, "--model", model, "--max-new-tokens", 9))["ended"]


# --------------------------------------------------------------------- kills and several processes

def test_killed_and_run_again_ends_with_the_same_weights(data, trained, tmp_path):
    """SIGTERM, Ctrl-C and SIGKILL in the middle of SFT and of RL: the same command goes on and ends
    where the uninterrupted run ended."""
    jobs = {}
    for out in (tmp_path / "whole", tmp_path / "killed"):
        shutil.copytree(trained / "base", out / "base")
        jobs[out / "sft"] = sft(data, out, "--stage", "sft", "--sft-batch", 2, "--save-every", 1)
        jobs[out / "rl"] = rl(data, trained / "sft", out / "rl", "--steps", 15, "--save-every", 1)
    killed = [tmp_path / "killed/sft", tmp_path / "killed/rl"]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        running, ended = {}, []
        for folder in killed:
            (name, *args), saves = jobs[folder], folder / "saves"
            running[saves] = set(saves.glob("step-??????")), process(f"{name}.py", *args)
        while running:
            time.sleep(0.01)
            for saves, (seen, script) in list(running.items()):
                assert script.poll() is None, script.communicate()[1]
                if set(saves.glob("step-??????")) - seen:
                    script.send_signal(number)
                    ended.append(running.pop(saves)[1])
        for script in ended:
            _, err = script.communicate()
            assert script.returncode == (130 if number == signal.SIGINT else -number), err
    for folder in killed:  # what a kill in the middle of a save and of a line leaves
        (folder / "saves/step-999999.tmp").mkdir()
        (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text() + '{"step": 9')
    for job in jobs.values():
        good(*job)
    for name in ("sft", "rl"):
        one, two = tmp_path / "whole" / name, tmp_path / "killed" / name
        assert equal(weights(one), weights(two)) and untimed(one) == untimed(two)


@pytest.mark.parametrize("limit,says", [(100_000, "step-000001: can't be written"), (99, "")])
def test_a_full_disk_is_one_line(data, trained, tmp_path, limit, says):
    """No file may grow beyond `limit` bytes; afterwards the same command goes on."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    job = rl(data, trained / "sft", tmp_path / "rl", "--save-every", 1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert says in mistake(*job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("rl/saves/*.tmp"))
    good(*job)
    assert equal(weights(tmp_path / "rl"), weights(trained / "rl"))


BOTH = """import json, sys
sys.path.insert(0, sys.argv[1])
import torch, echo, train_rl, train_sft
torch.optim.AdamW = lambda groups, lr, **_: torch.optim.SGD(groups, lr)
sample_tokens = echo.sample_tokens

def scripted(model, hidden, rows, temperature):
    tokens, logp = sample_tokens(model, hidden, rows, temperature)
    for k, row in enumerate(rows if temperature else ()):
        n = row.draws.initial_seed() % 3
        said = "<think><seg>0, 1</seg> a" + ("</think><answer>two</answer>", "<seg>1, 2", "")[n]
        tokens[k] = [*model.ids(said), model.tokenizer.eos_token_id][len(row.logprobs)]
        logp[k] = model.decoder.lm_head(hidden[k]).log_softmax(-1)[tokens[k]].item()
    return tokens, logp
echo.sample_tokens = scripted
for sys.argv in json.loads(sys.argv[2]):
    try:
        {"train_sft": train_sft, "train_rl": train_rl}[sys.argv[0]].run()
    except echo.EchoError as error:
        print(error)
"""


def test_two_processes_equal_one(data, trained, tmp_path):
    """The same global batch on one and on two gloo processes: the same log and the same weights.
    Responses are scripted and the optimiser is SGD: a draw between two tokens and Adam's first
    steps, which are signs, would make much of a rounding."""
    (tmp_path / "both.py").write_text(BOTH)
    for n in (1, 2):
        out = tmp_path / str(n)
        shutil.copytree(trained / "base", out / "base")
        jobs = [sft(data, out, "--stage", "sft", "--sft-steps", 1, "--sft-lr", 1),
                rl(data, trained / "sft", out / "rl", "--steps", 1, "--questions", 4, "--lr", 0.01,
                   test=data / "test.jsonl")]
        if n == 2:
            few = [*jobs[0], "--out", tmp_path, "--sft-batch", 1]
            jobs += few, [*jobs[1], "--out", tmp_path / "few", "--questions", 2]
            shutil.copytree(trained / "base", tmp_path / "base")
        jobs = json.dumps([[str(flag) for flag in job] for job in jobs])
        script = process("-m", "torch.distributed.run", f"--nproc_per_node={n}", "--standalone",
                         tmp_path / "both.py", HERE, jobs)
        said, err = script.communicate()
        assert script.returncode == 0, err[-2000:]
    assert said.count("2 processes for a batch of 1") == 2 == said.count("must be a multiple of")
    for name, start in (("sft", "base"), ("rl", "sft")):
        before, one, two = (weights(p) for p in (
            trained / start, tmp_path / "1" / name, tmp_path / "2" / name))
        apart, learned = (sum(((w[k] - one[k]) ** 2).sum() for k in one) for w in (two, before))
        assert apart < 1e-5 * learned and learned > 1e-6
        for a, b in zip(*(untimed(tmp_path / n / name) for n in "12"), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=3e-5)


# ------------------------------------------------------------------------ pages, in a real browser

@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless Chromium over WebDriver: browser(page, script, result, seconds) -> what `result`
    is so many seconds after the script."""
    if not shutil.which("chromedriver"):
        pytest.skip("no Chromium with chromedriver here: apt-get install chromium-driver")
    port = 20_000 + os.getpid() % 20_000
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def call(path, body, method="POST"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/session{path}", method=method,
                                         data=json.dumps(body).encode())
        return json.load(no_proxy.open(request, timeout=60))["value"]
    flags = ["--headless", "--no-sandbox", "--disable-gpu",
             "--autoplay-policy=no-user-gesture-required",
             f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]
    wanted, session = {"alwaysMatch": {"goog:chromeOptions": {"args": flags}}}, None
    while not session:
        assert driver.poll() is None
        with contextlib.suppress(OSError):  # not yet listening
            session = "/" + call("", {"capabilities": wanted})["sessionId"]

    def open_page(page, script, result, seconds=0.0):
        call(session + "/url", {"url": Path(page).as_uri()})
        call(session + "/execute/sync", {"script": script, "args": []})
        time.sleep(seconds)
        return call(session + "/execute/sync", {"script": "return " + result, "args": []})
    yield open_page
    call(session, {}, "DELETE")
    driver.terminate()


HOSTILE = "<script>document.title='pwned'</script><img src=x onerror='document.title=1'>&amp;"


@pytest.fixture
def traced(model, tmp_path, monkeypatch):
    """The page of a response full of hostile text, and its Rollout."""
    said = f"{HOSTILE} <seg>0.5, 1.5</seg> it <seg>9, 10</seg> {HOSTILE}"
    write(monkeypatch, model, [f"<think>{said}</think><answer>hum</answer>"])
    wave, how = noise(3.0), generate.Settings(max_new_tokens=300)
    row = rollouts(model, asked(model, [wave], HOSTILE), [wave], max_new_tokens=300)[0]
    q = echo.Question({}, None, HOSTILE, ["hum", HOSTILE], "hum", "all")
    generate.trace_page(tmp_path / "trace.html", model, wave, q, row, how)
    return tmp_path / "trace.html", row


def test_pages_are_self_contained_and_show_attention(model, traced):
    page, row = traced[0].read_text(), traced[1]
    assert "<script>document.title" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page and not re.search(r"(src|href)=[\"']?(https?:)?//", page)
    shares = generate.attention_shares(model, row)
    assert shares.shape == (len(row.logprobs), 2) and (shares.sum(1) <= 1 + 1e-5).all()
    closed = len(model.ids(row.text.split("</seg>")[0])) + 1
    first, again = shares.T > 0
    assert first.all() and not again[:closed].any() and again[closed:].all()


def test_a_chip_plays_its_segment_and_hostile_text_stays_text(traced, browser):
    title, started, stopped, later, text = browser(traced[0], """
        const player = document.querySelector('audio'); window.seen = [document.title];
        player.addEventListener('playing', () => seen.push(player.currentTime));
        player.addEventListener('pause', () => seen.push(player.currentTime));
        document.querySelector('button.chip').click();
        """, "[...seen, document.title, document.body.innerText]", 4.0)
    assert title == later == "Echo: a trace" and HOSTILE in text and "outside the clip" in text
    assert abs(started - 0.5) < 0.3 and abs(stopped - 1.5) < 0.3


def test_report_and_index_in_a_browser(data, trained, tmp_path, browser):
    good("generate", "--report", trained / "rl", "--against", trained / "sft")
    charts, text = browser(trained / "rl/report.html", "",
                           "[document.querySelectorAll('svg').length, document.body.innerText]")
    assert charts > 15 and generate.METRICS["kl"] in text
    charts, left = "", "[...document.querySelectorAll('svg text')].map(t => t.getBBox().x)"
    for y in (7.8e-4, 1.234e-4, -3.21e-5, 5432.1):
        charts += generate.chart([("run", "red", [(0, y / 3), (9, y)], False)], "step", 320, 150)
    generate.page(tmp_path / "charts.html", "charts", charts)
    assert min(browser(tmp_path / "charts.html", "", left)) >= 0  # no label is cut
    good("generate", "--benchmark", data / "test.jsonl", "--model", trained / "rl", "--html",
         tmp_path / "index.html")
    shown = "[...document.querySelectorAll('details')].filter(d => !d.hidden).length"
    pick = """const kind = document.getElementById('kind'); kind.value = 'order';
              kind.dispatchEvent(new Event('change'))"""
    assert [browser(tmp_path / "index.html", x, shown) for x in ("", pick)] == [6, 2]


# ------------------------------------------------------------- python test_echo.py: measurements

def seconds(call, repeat=5):
    """The median of some timings, after a first call that is not counted."""
    took = []
    for _ in range(repeat + 1):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return sorted(took[1:])[repeat // 2]


def probe(model, clips):
    """What a small network reads of the number of pulses from a sound's tokens."""
    x, y, rate = {"first-listen": [], "full-rate": []}, [], model.config.first_listen_rate or 25
    for clip in clips:
        wave = load_audio(Path("data") / clip["audio_path"])
        places = [(e["start_s"], e["end_s"]) for e in clip["A4_events"]]
        first = model.hear([wave], True)[0]
        x["first-listen"] += [echo.cut(first, *place, rate).flatten() for place in places]
        x["full-rate"] += [t.flatten() for t in model.hear([echo.cut(wave, *p) for p in places])]
        y += [e["pulses"] for e in clip["A4_events"]]
    y, n = torch.tensor(y), len(y) * 4 // 5  # the last fifth is not trained on
    for name, tokens in x.items():
        tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        tokens = (tokens - tokens.mean(0)) / (tokens.std(0) + 1e-3)
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(tokens.shape[1], 128), torch.nn.GELU(),
                                  torch.nn.Linear(128, 7))
        optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.1)
        for _ in range(300):
            i = torch.randint(n, (128,))
            optimizer.zero_grad()
            F.cross_entropy(net(tokens[i]), y[i]).backward()
            optimizer.step()
        right = (net(tokens[n:]).argmax(1) == y[n:]).float().mean()
        print(f"number of pulses read from {name} tokens: {right:.1%} of {len(y) - n} (chance 20%)")


@torch.no_grad()
def one_by_one(model, prompt, wave, seed, n_tokens):
    """The published scheme: a row at a time, the whole of it prefilled again after each segment."""
    row = Rollout(prompt.copy(), wave, torch.Generator().manual_seed(seed))
    while not row.ended:
        cache, since = echo.Cache(config=model.decoder.config), 0
        cache.dtype = torch.bfloat16 if model.bf16 else torch.float32
        while not row.ended and not row.waiting:
            ids, position, _, audio = model.tensors([row.sample], [since])
            since = len(row.sample.ids)
            hidden = model.hidden(ids, position, torch.ones(1, since).long(), audio, cache)[:, -1]
            token, logp = echo.sample_tokens(model, hidden, [row], 1.0)
            echo.add_token(model, row, token[0], logp[0], "interleaved", n_tokens)
        if row.waiting:
            echo.listen_again(model, [row], "segment")
    return row


@torch.no_grad()
def decoding_speed(model, prompts, waves, n_tokens):
    """64 rollouts against one by one and against transformers' generate, and the sampler's cost."""
    def batched(**more):
        return rollouts(model, prompts, waves, 8, **more)
    rows, alone = batched(max_new_tokens=n_tokens), []
    together = seconds(lambda: batched(max_new_tokens=n_tokens), 3)
    began = time.perf_counter()
    with model.autocast():
        for i in range(8):
            alone.append(one_by_one(model, prompts[i], waves[i], 8 * i, n_tokens))
    ratio = 8 * (time.perf_counter() - began) / together
    as_one = sum(a.sample.ids == b.sample.ids for a, b in zip(alone, rows[::8]))
    print(f"64 interleaved rollouts against one by one with re-prefill: {ratio:.1f} times the "
          f"responses a second ({64 / together:.1f}); same ids in {as_one} of 8")
    ids, _, mask, audio = model.tensors([p for p in prompts for _ in range(8)])
    (x, eos), model.eos_ids = (model.embed(ids, audio), model.eos_ids), set()
    ours = seconds(lambda: batched(reasoning="text", temperature=0.0, max_new_tokens=40), 3)
    with model.autocast():
        theirs = seconds(lambda: model.decoder.generate(
            inputs_embeds=x, attention_mask=mask, do_sample=False, min_new_tokens=40,
            max_new_tokens=40, pad_token_id=0), 3)
        sampler = seconds(lambda: echo.sample_tokens(model, x[:, -1], rows, 1.0))
    model.eos_ids = eos
    print(f"64 rows of 40 tokens against transformers' generate: {theirs / ours:.2f} times its "
          f"speed; a step takes {25 * ours:.1f} ms, its sampling {1000 * sampler:.1f} ms")
    return rows


def training_speed(model, samples):
    ids, _, mask, audio = model.tensors(samples)

    def bare():
        with model.autocast():
            model.decoder(inputs_embeds=model.embed(ids, None), attention_mask=mask,
                          labels=ids.where(ids >= 0, -100)).loss.backward()
    ours, theirs = seconds(lambda: (-model(samples).mean()).backward()), seconds(bare)
    print(f"a training step of {int(mask.sum())} tokens against a bare forward and backward of the "
          f"decoder: {theirs / ours:.2f} times its speed ({ours:.2f} s)")


def memory(policy, reference, samples, cache_bytes):
    """What a GRPO step holds, by part, as it is allocated."""
    def size(tensors):
        return sum({x.data_ptr(): x.nbytes for x in tensors}.values()) / 1e9
    kept, weights = [], list(policy.parameters())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        policy(samples)
    trained = size(p for p in weights if p.requires_grad)
    parts = {"trained weights": trained, "frozen weights": size(weights) - trained,
             "gradients": trained, "AdamW": 2 * trained, "reference": size(reference.parameters()),
             f"kept for the backward pass of {sum(len(s.ids) for s in samples)} tokens":
                 size(kept + weights) - size(weights),
             "3 arrays of logits": 12 * policy.LOGITS_AT_ONCE / 1e9, "KV cache": cache_bytes / 1e9,
             "peak of this process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}
    print("GB: " + ", ".join(f"{k} {v:.3f}" for k, v in parts.items()))


def measure(folder="runs/rl"):
    model, questions = load(folder), read_questions("data/test.jsonl")[:8]
    policy = echo.prepare(load(Path(folder).parent / "sft"), train_rl.Settings())
    echo.prepare(model, train_rl.Settings(train="none"))
    tiny = model.config.decoder == "tiny"
    probe(model, echo.read_rows("data/clips.jsonl")[:1500])
    waves = [load_audio(q.path) for q in questions]
    heard = zip(model.hear(waves, True), questions)
    prompts = [model.prompt(first, q.question, q.choices) for first, q in heard]
    rows = decoding_speed(model, prompts, waves, 100 if tiny else 40)
    with pytest.MonkeyPatch.context() as patch:
        passes = count_passes(patch, model)
        rollouts(model, prompts, waves, 8, max_new_tokens=100 if tiny else 40)
    samples = [row.sample for row in rows[::2 if tiny else 8]]
    training_speed(policy, samples)
    memory(policy, model, samples, max(p.bytes for p in passes))


if __name__ == "__main__":
    measure(*sys.argv[1:])
