"""nlpkernels.freeze on networks that somebody trained: what they decide stays as it was.

Two packages on PyPI carry such networks: silero-vad's hears whether somebody speaks, g2p-en's says how an English word
is spoken. Their arrays are read and none of their code is run, so `make test` installs them without what that needs.
Skipped where they are missing. `pytest -s` shows the figures.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import tolerances
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

import nlpkernels

Change = Callable[[nn.Module], object]  # of a network, in place
REDUCED = [torch.bfloat16, torch.int8]


def unchanged(network: nn.Module) -> None:
    pass


def four_bits(network: nn.Module) -> None:
    """Rounds recurrent weights to the 15 values that four bits can tell apart in a row: more than a network stands."""
    for module in network.modules():
        if isinstance(module, nn.RNNBase | nn.RNNCellBase):
            for name, parameter in module.named_parameters():
                if name.startswith("weight"):
                    step = parameter.detach().abs().amax(1, keepdim=True) / 7
                    parameter.data.div_(step).round_().mul_(step)


def freeze(dtype: torch.dtype) -> Change:
    return functools.partial(nlpkernels.freeze, dtype=dtype)


def file_of(package: str, name: str) -> Path:
    """A file that an installed package has brought."""
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        pytest.skip(f"pip install --no-deps {package}")


# --- Does somebody speak? --------------------------------------------------------------------------------------------

RATE = 16_000  # samples a second
LSTMS = [nn.LSTMCell, nn.LSTM]
FORMANTS = np.array([(730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410)])


def speech(seconds: int, pitch: float, random: np.random.RandomState) -> np.ndarray:
    """Syllables that mean nothing: harmonics of a pitch that wanders, in the formants of one vowel after another."""
    at = np.arange(seconds * RATE) / RATE

    def wander(size: float) -> np.ndarray:
        return np.exp(np.interp(at, np.arange(3 * seconds + 1) / 3, random.normal(0, size, 3 * seconds + 1)))

    syllable = np.cumsum(4.5 * wander(0.2)) / RATE
    hertz = pitch * wander(0.12)
    vowels = FORMANTS[random.randint(len(FORMANTS), size=8 * seconds)]
    tones = [np.interp(syllable, np.arange(len(vowels)) + 0.5, tone) for tone in vowels.T]
    voice, phase = np.zeros(len(at)), 2 * np.pi * np.cumsum(hertz) / RATE
    for k in range(1, int(4000 / pitch)):
        loud = [size / (1 + ((k * hertz - tone) / 100) ** 2) for tone, size in zip(tones, (1, 0.6, 0.3), strict=True)]
        voice += sum(loud) * np.sin(k * phase)
    voice *= np.abs(np.sin(np.pi * syllable)) ** 0.6
    hiss = np.diff(random.normal(size=len(at) + 1)) * (syllable % 1 < 0.15)  # of a consonant
    return 0.3 * voice / np.abs(voice).max() + 0.01 * hiss


@functools.cache
def sound() -> Tensor:
    """26 seconds: silence, speech, noise and speech in a little noise, then the same of another voice."""
    random = np.random.RandomState(103)  # of 120, the one that leaves the fewest doubts; its numbers never change
    parts = []
    for pitch in (110, 200):
        parts += [np.zeros(2 * RATE), speech(5, pitch, random), random.normal(0, 0.01, 2 * RATE)]
        parts += [speech(4, 1.2 * pitch, random) + random.normal(0, 0.002, 4 * RATE)]
    return torch.from_numpy(np.concatenate(parts)).float()


def frames_of(sound: Tensor) -> Tensor:
    """Pieces of 32 ms, each with the last 4 ms of the one before it."""
    return F.pad(sound, (64, 0)).unfold(0, 576, 512)


class Detector(nn.Module):
    """Silero VAD at 16 kHz, with the LSTM as a cell or as a layer: how probable it is in each frame that one speaks."""

    def __init__(self, lstm: type[nn.Module]) -> None:
        super().__init__()
        self.spectrum = nn.Conv1d(1, 258, 256, stride=128, bias=False)  # real parts, then imaginary ones
        sizes = ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        self.encoder = nn.ModuleList(nn.Conv1d(*channels, 3, stride, padding=1) for *channels, stride in sizes)
        self.is_streaming = lstm is nn.LSTMCell
        self.lstm = lstm(128, 128)
        self.output = nn.Linear(128, 1)

    def forward(self, frames: Tensor) -> Tensor:
        real, imaginary = self.spectrum(F.pad(frames.unsqueeze(1), (0, 64), mode="reflect")).chunk(2, 1)
        x = (real**2 + imaginary**2).sqrt()
        for layer in self.encoder:
            x = layer(x).relu()
        return self.output(self.states(x.squeeze(2)).relu()).sigmoid().squeeze(1)

    def states(self, x: Tensor) -> Tensor:
        """Of the LSTM after each frame. A cell gets one at a time, as they come."""
        if not self.is_streaming:
            return self.lstm(x.unsqueeze(1))[0].squeeze(1)
        state, states = None, []
        for frame in x.split(1):
            state = self.lstm(frame, state)
            states.append(state[0])
        return torch.cat(states)


def detector_file() -> Path:
    return file_of("silero-vad", "silero_vad/data/silero_vad_16k_sequence.onnx")


@functools.cache
def detector(lstm: type[nn.Module]) -> Detector:
    """With the arrays of the package."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.load(detector_file()).graph
    arrays = {array.name: torch.tensor(onnx.numpy_helper.to_array(array)) for array in graph.initializer}
    (node,) = (node for node in graph.node if node.op_type == "LSTM")
    weight_ih, weight_hh, biases = (arrays[name][0] for name in node.input[1:4])
    parameters = {"weight_ih": weight_ih, "weight_hh": weight_hh}
    parameters["bias_ih"], parameters["bias_hh"] = biases.chunk(2)
    network = Detector(lstm)
    for name, parameter in network.lstm.named_parameters():
        i, o, f, g = parameters[name.removesuffix("_l0")].chunk(4)  # the order of gates in ONNX
        parameter.data = torch.cat([i, f, g, o])
    network.spectrum.weight.data = arrays["stft.forward_basis_buffer"]
    named = [f"{i}.{name}" for i in range(4) for name in ("weight", "bias")]
    network.encoder.load_state_dict({name: arrays[f"encoder.{name}"] for name in named})
    network.output.load_state_dict({"weight": arrays["output.weight"].squeeze(2), "bias": arrays["output.bias"]})
    return network.eval()


def probabilities(lstm: type[nn.Module], change: Change = unchanged) -> Tensor:
    """What a changed detector makes of the sound."""
    network = copy.deepcopy(detector(lstm))
    change(network)
    with torch.inference_mode():
        return network(frames_of(sound()))


def check_decisions(lstm: type[nn.Module], change: Change) -> None:
    """That none differs."""
    right, got = probabilities(lstm), probabilities(lstm, change)
    differ = int(((got > 0.5) != (right > 0.5)).sum())
    figures = f"{differ} of {len(right)} decisions differ, probabilities by up to {(got - right).abs().max():.4f}"
    print(figures)
    assert got.isfinite().all() and differ == 0, figures


def test_detector() -> None:
    """It is that of the package. On this sound it hears much of both kinds, and is never close to the threshold."""
    runtime = pytest.importorskip("onnxruntime")
    right = probabilities(nn.LSTMCell)
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # no warnings of what the file could leave out
    session = runtime.InferenceSession(detector_file(), options, providers=["CPUExecutionProvider"])
    state = np.zeros((1, 1, 128), np.float32)
    (theirs,) = session.run(["speech_probs"], {"input": frames_of(sound()).numpy(), "h": state, "c": state})
    torch.testing.assert_close(right, torch.from_numpy(theirs), rtol=0, atol=1e-4)
    torch.testing.assert_close(probabilities(nn.LSTM), right, rtol=0, atol=1e-4)
    margin, speaks = (right - 0.5).abs().min().item(), (right > 0.5).float().mean().item()
    figures = f"{speaks:.0%} of {len(right)} frames are speech, no probability is nearer to 0.5 than {margin:.3f}"
    print(figures)
    assert margin > tolerances.CLEAR and 0.5 < speaks < 0.75, figures


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("lstm", LSTMS)
def test_decisions(lstm: type[nn.Module], dtype: torch.dtype) -> None:
    check_decisions(lstm, freeze(dtype))


# --- How is a word spoken? -------------------------------------------------------------------------------------------

LETTERS = ["<pad>", "<unk>", "</s>", *"abcdefghijklmnopqrstuvwxyz"]
VOWELS = "AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split()
CONSONANTS = "B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split()
STRESSED = [vowel + stress for vowel in VOWELS for stress in "012"]
PHONEMES = ["<pad>", "<unk>", "<s>", "</s>", *sorted([*CONSONANTS, *STRESSED, "UW"])]
START, END = PHONEMES.index("<s>"), PHONEMES.index("</s>")
MOST = 20  # phonemes of a word


class Speller(nn.Module):
    """The network of g2p-en: a GRU reads a word's letters, a GRU cell says phonemes, the likeliest each, to the end."""

    def __init__(self) -> None:
        super().__init__()
        self.letters, self.phonemes = nn.Embedding(len(LETTERS), 256), nn.Embedding(len(PHONEMES), 256)
        self.encoder, self.decoder = nn.GRU(256, 256), nn.GRUCell(256, 256)
        self.output = nn.Linear(256, len(PHONEMES))

    def forward(self, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The phonemes of each word, filled up with ends, and what the last step gave to each phoneme."""
        letters = [torch.tensor([*map(LETTERS.index, word), LETTERS.index("</s>")]) for word in words]
        _, states = self.encoder(pack_sequence([self.letters(word) for word in letters], enforce_sorted=False))
        state, last, said = states[0], torch.full((len(words),), START), []
        while len(said) < MOST and bool((last != END).any()):
            state = self.decoder(self.phonemes(last), state)
            scores = self.output(state)
            last = scores.argmax(1).where(last != END, END)
            said.append(last)
        return F.pad(torch.stack(said, 1), (0, MOST - len(said)), value=END), scores


@functools.cache
def speller() -> Speller:
    """With the arrays of the package."""
    with np.load(file_of("g2p-en", "g2p_en/checkpoint20.npz")) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    names = {"letters.weight": "enc_emb", "phonemes.weight": "dec_emb", "output.weight": "fc_w", "output.bias": "fc_b"}
    network = Speller()
    for name, parameter in network.named_parameters():
        short = names.get(name) or name.replace("oder.weight", "_w").replace("oder.bias", "_b").removesuffix("_l0")
        parameter.data = arrays[short]
    return network.eval()


def spoken(words: Sequence[str], change: Change = unchanged, at_once: bool = True) -> tuple[Tensor, Tensor]:
    """What a changed speller makes of some words."""
    network = copy.deepcopy(speller())
    change(network)
    with torch.inference_mode():
        if at_once:
            return network(words)
        phonemes, scores = zip(*(network([word]) for word in words), strict=True)
        return torch.cat(phonemes), torch.cat(scores)


@functools.cache
def frequent_words(count: int) -> list[str]:
    wordfreq = pytest.importorskip("wordfreq")
    words = [word for word in wordfreq.top_n_list("en", 2 * count) if word.isascii() and word.isalpha()]
    assert len(words) >= count
    return words[:count]


def check_phonemes(change: Change, at_once: bool = True) -> None:
    """That next to no word is spoken in another way."""
    words = frequent_words(2000)
    right, got = spoken(words)[0], spoken(words, change, at_once)[0]
    differ = [word for word, same in zip(words, (got == right).all(1).tolist(), strict=True) if not same]
    figures = f"{len(differ)} of {len(words)} words are spoken in another way: {' '.join(differ[:20])}"
    print(figures)
    assert len(differ) <= tolerances.WORDS_SPOKEN_ANOTHER_WAY * len(words), figures


def test_speller() -> None:
    """It is that of the package, on whose page this word is one that the dictionary has not."""
    (phonemes,), _ = spoken(["activationist"])
    said = [PHONEMES[phoneme] for phoneme in phonemes if phoneme != END]
    assert said == "AE2 K T IH0 V EY1 SH AH0 N IH0 S T".split()


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
@pytest.mark.parametrize("at_once", [True, False], ids=["all at once", "one by one"])
def test_phonemes(at_once: bool, dtype: torch.dtype) -> None:
    check_phonemes(freeze(dtype), at_once)


# --- Both ------------------------------------------------------------------------------------------------------------


def test_float32_is_as_converted() -> None:
    for lstm in LSTMS:
        frozen, converted = (probabilities(lstm, change) for change in (freeze(torch.float32), nlpkernels.convert))
        assert torch.equal(frozen, converted)
    for at_once in (True, False):
        words = frequent_words(100)
        frozen, converted = (spoken(words, change, at_once) for change in (freeze(torch.float32), nlpkernels.convert))
        assert torch.equal(frozen[0], converted[0]) and torch.equal(frozen[1], converted[1])


def test_four_bits_are_noticed() -> None:
    """The sound and the words can tell: with weights of four bits each comparison fails."""
    for lstm in LSTMS:
        with pytest.raises(AssertionError, match="decisions differ"):
            check_decisions(lstm, four_bits)
    with pytest.raises(AssertionError, match="in another way"):
        check_phonemes(four_bits)


def test_recurrent_layers_are_frozen_and_no_others() -> None:
    for network, names in ((detector(nn.LSTMCell), {"lstm"}), (speller(), {"encoder", "decoder"})):
        assert set(nlpkernels.freeze(copy.deepcopy(network)).swapped) == names
