"""What is measured: shapes that occur in practice, named after what they are, each with its source.

A new workload is one more entry in a table below. T steps, B sequences or bags, I inputs, H hidden units, V rows in a
table of D columns, L indices a bag: the letters of the equations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

RNNS = ("rnn", "gru", "lstm")
RECURRENT_MODES = ("inference", "train")
# Whole training steps of a table. update: with SGD, however that is best done; the others: with a gradient of that kind
# and an optimizer of torch.optim, which reads all of a dense one, and for which uses of a row have to be summed in a
# sparse one, by the layer or by the optimizer.
DENSE_MODES = ("dense-sgd", "dense-adam")
SPARSE_MODES = ("sparse-sgd", "sparse-adam", "sparse-adagrad")
STEP_MODES = ("update", *DENSE_MODES, *SPARSE_MODES)
POOL_MODES = ("inference", "train", *SPARSE_MODES)  # train: forward, and a dense gradient that nobody reads


@dataclass(frozen=True)
class Workload:
    """One named shape. `kind`: a layer over a `sequence`, one step of a `cell`, a `bag`, or `embedding` and mean."""

    name: str
    subject: str
    kind: str
    source: str
    cells: tuple[str, ...] = ()
    modes: tuple[str, ...] = RECURRENT_MODES
    T: int = 1
    B: int = 1
    I: int = 0  # noqa: E741 (the letter of the equations)
    H: int = 0
    layers: int = 1
    directions: int = 1
    state: bool = False  # an initial state is passed in, as streaming does
    ragged: bool = False  # sequences, or bags, differ in length
    V: int = 0
    D: int = 0
    L: int = 0
    draw: str = ""  # where indices come from: words (their real frequencies) or uniform
    padding: bool = False  # short bags are filled up with padding_idx
    heavy: bool = False  # `all` runs it with the most threads only
    axis: str = ""  # of a scaling grid: which letter varies

    @property
    def shape(self) -> str:
        """The shape in a form that fits a table's cell."""
        if self.kind in ("bag", "embedding"):
            text = f"V={self.V:,} D={self.D} B={self.B} L{'≤' if self.ragged or self.padding else '='}{self.L}"
            return f"{text} {self.draw}" + (" padded" if self.padding else "")
        steps = "" if self.kind == "cell" else f"T{'≤' if self.ragged else '='}{self.T} "
        text = f"{steps}B={self.B} I={self.I} H={self.H}"
        return text + (f" ×{self.layers}" if self.layers > 1 else "") + (" ⇄" if self.directions > 1 else "")

    def shrunk(self) -> Workload:
        """The same at a toy size, under a name that nobody can mistake for the real one."""
        small = {letter: min(getattr(self, letter), most) for letter, most in {"T": 8, "B": 4, "H": 128}.items()}
        return replace(self, name=f"{self.name}~quick", V=min(self.V, 5000), L=min(self.L, 8), heavy=False, **small)


def _sequence(name: str, cells: tuple[str, ...], source: str, **shape: object) -> Workload:
    return Workload(name, "recurrent", "sequence", source, cells, **shape)  # type: ignore[arg-type]


def _deployed(name: str, cell: str, source: str, kind: str = "sequence", **shape: object) -> Workload:
    return Workload(name, "deployed", kind, source, (cell,), ("inference",), **shape)  # type: ignore[arg-type]


def _pool(subject: str, name: str, source: str, **shape: object) -> Workload:
    return Workload(name, subject, subject, source, ("mean",), **{"modes": POOL_MODES, **shape})  # type: ignore[arg-type]


# fmt: off
SEQUENCES = (
    _sequence(
        "streaming", ("gru", "lstm"), "one frame at a time with a state of 128, as in Silero VAD's LSTM",
        T=1, B=1, I=128, H=128, state=True, modes=("inference",),
    ),
    _sequence(
        "streaming chunk", ("lstm",), "a second of speech at a time, 100 frames, with the same state",
        T=100, B=1, I=128, H=128, state=True, modes=("inference",),
    ),
    _sequence(
        "time series", ("gru", "lstm"), "a week of hours from 8 covariates: DeepAR (Salinas et al., 2017)",
        T=168, B=32, I=8, H=64,
    ),
    _sequence(
        "sentiment", ("lstm",), "reviews cut at 200 GloVe words, as in the usual IMDb tutorials",
        T=200, B=32, I=300, H=256, layers=2, directions=2,
    ),
    _sequence(
        "sentiment ragged", ("gru", "lstm"), "the same reviews in their own lengths: PackedSequence",
        T=200, B=32, I=300, H=256, directions=2, ragged=True,
    ),
    _sequence(
        "word language model", ("lstm",), "AWD-LSTM (Merity et al., 2017) on WikiText-2; here all three are 1150",
        T=70, B=80, I=400, H=1150, layers=3, heavy=True,
    ),
    _sequence(
        "GRU encoder", ("gru",), "RNNsearch-30's encoder (Bahdanau et al., 2015): 620, 1000, both directions, batch 80",
        T=30, B=80, I=620, H=1000, directions=2, heavy=True,
    ),
    _sequence(
        "character model", ("lstm", "rnn"), "char-rnn's defaults (Karpathy, 2015), one-hot characters",
        T=50, B=50, I=65, H=128, layers=2,
    ),
    _sequence(
        "long sequence", ("gru", "lstm"), "40 s of 40 filter banks at 10 ms a frame: speech recognition",
        T=4000, B=4, I=40, H=256, heavy=True,
    ),
    _sequence(
        "tagger", ("lstm",), "BiLSTM-CRF (Lample et al., 2016): words of 100; no power of two",
        T=30, B=32, I=100, H=96, directions=2,
    ),
    _sequence("odd width", ("gru", "lstm"), "GloVe words, 200 units: uneven tiles", T=50, B=32, I=300, H=200),
    _sequence(
        "medium language model", ("lstm",), "Zaremba et al., 2014, medium: 2 x 650, 35 steps, batch 20",
        T=35, B=20, I=650, H=650, layers=2,
    ),
    # The four shapes that this project was planned by, from one sequence at a time to a batch that fills the machine.
    _sequence("one of 128", RNNS, "a single sequence of 100 steps", T=100, B=1, I=128, H=128),
    _sequence("eight of 256", RNNS, "a small batch of GloVe words", T=50, B=8, I=300, H=256),
    _sequence("32 of 256", RNNS, "a batch of even width", T=128, B=32, I=256, H=256),
    _sequence("64 of 512", RNNS, "a large batch of even width", T=100, B=64, I=512, H=512, heavy=True),
)

CELLS = (
    Workload("one step", "cells", "cell", "an agent that acts, one observation at a time", RNNS, B=1, I=128, H=128),
    Workload("decoder step", "cells", "cell", "a beam of 5 in a translation decoder", RNNS, B=5, I=256, H=256),
    Workload("agent step", "cells", "cell", "a policy over 256 environments", RNNS, B=256, I=256, H=256),
)

# The recurrent layers of programs that many people run as they are: nobody trains them there.
DEPLOYED = (
    _deployed("silero-vad", "lstm", "a voice detector: one frame of 32 ms", "cell", B=1, I=128, H=128),
    _deployed(
        "rnnoise", "gru", "noise suppression since 0.2: one frame of 10 ms through three layers",
        T=1, B=1, I=384, H=384, layers=3, state=True,
    ),
    _deployed(
        "deepfilternet encoder", "gru", "noise suppression, DeepFilterNet3's defaults: one frame of 10 ms",
        T=1, B=1, I=256, H=256, state=True,
    ),
    _deployed(
        "deepfilternet filters", "gru", "its decoder of filters: one frame",
        T=1, B=1, I=256, H=256, layers=3, state=True,
    ),
    _deployed("deepfilternet encoder 1 s", "gru", "the same for a second", T=100, B=1, I=256, H=256),
    _deployed("deepfilternet filters 1 s", "gru", "the same for a second", T=100, B=1, I=256, H=256, layers=3),
    _deployed("encodec", "lstm", "Encodec at 24 kHz: a second of sound", T=75, B=1, I=512, H=512, layers=2),
    _deployed(
        "transducer", "lstm", "the prediction network of Parakeet's transducers: one token of speech recognition",
        T=1, B=1, I=640, H=640, layers=2, state=True,
    ),
    _deployed("tacotron2", "lstm", "the decoder of speech synthesis: one frame", "cell", B=1, I=1536, H=1024),
    _deployed(
        "crnn word", "lstm", "docTR's crnn_vgg16_bn: one word of a page",
        T=32, B=1, I=512, H=128, layers=2, directions=2,
    ),
    _deployed(
        "crnn page", "lstm", "docTR's crnn_vgg16_bn: 64 words", T=32, B=64, I=512, H=128, layers=2, directions=2,
    ),
    _deployed(
        "stanza", "lstm", "Stanza's tagger, its defaults: words of 75 and 125, 125 of characters; 32 sentences",
        T=40, B=32, I=325, H=200, layers=2, directions=2, ragged=True,
    ),
)

BAGS = (
    _pool(
        "bag", "news topics", "PyTorch's text classification tutorial on AG_NEWS, with offsets",
        V=95_811, D=64, B=64, L=60, draw="words", ragged=True, modes=(*POOL_MODES, *DENSE_MODES),
    ),
    _pool(
        "bag", "reviews", "deep averaging network (Iyyer et al., 2015) on IMDb, padded",
        V=25_000, D=300, B=32, L=256, draw="words", padding=True, modes=(*POOL_MODES, *DENSE_MODES),
    ),
    _pool("bag", "query", "four short queries, a small vocabulary", V=8_000, D=50, B=4, L=25, draw="words"),
    _pool(
        "bag", "GloVe", "glove.6B.100d: 400,000 words", V=400_000, D=100, B=128, L=50, draw="words",
        modes=(*POOL_MODES, "dense-sgd"),
    ),
    _pool(
        "bag", "GloVe in large batches", "the same words, 1,024 texts at once",
        V=400_000, D=100, B=1024, L=40, draw="words", modes=DENSE_MODES,
    ),
    _pool(
        "bag", "fastText", "crawl-300d-2M: two million words of 300", V=2_000_000, D=300, B=64, L=40, draw="words",
        modes=("inference", "sparse-sgd"),
    ),
    _pool(
        "bag", "click logs", "a hashed feature in a large batch: caches do not help",
        V=1_000_000, D=128, B=512, L=100, draw="uniform", heavy=True,
    ),
    _pool(
        "bag", "recommender", "items of a user's history, two million of them: what an update costs beside the table",
        V=2_000_000, D=64, B=512, L=25, draw="words", modes=("inference", *STEP_MODES),
    ),
    _pool(
        "bag", "small recommender", "the same from a hundredth of the items: an update's cost should not differ much",
        V=20_000, D=64, B=512, L=25, draw="words", modes=("update", *SPARSE_MODES),
    ),
)

EMBEDDINGS = (
    _pool("embedding", "query", "four short queries, a small vocabulary", V=8_000, D=50, B=4, L=25, draw="words"),
    _pool(
        "embedding", "reviews", "deep averaging network on IMDb, padded, masked mean",
        V=25_000, D=300, B=32, L=256, draw="words", padding=True,
    ),
    _pool(
        "embedding", "GloVe", "glove.6B.100d: 400,000 words", V=400_000, D=100, B=128, L=50, draw="words",
        modes=(*POOL_MODES, *DENSE_MODES),
    ),
    _pool(
        "embedding", "hashed n-grams", "uniform indices: the memory's speed, not the caches'",
        V=200_000, D=128, B=128, L=50, draw="uniform",
    ),
)

# So little work that only the way to it is measured.
OVERHEAD = (
    Workload("tiny layer", "overhead", "sequence", "call overhead", RNNS, T=1, B=1, I=8, H=8),
    Workload("tiny cell", "overhead", "cell", "call overhead", RNNS, B=1, I=8, H=8),
    Workload(
        "tiny bag", "overhead", "bag", "call overhead", ("mean",), POOL_MODES, B=1, V=100, D=8, L=2, draw="uniform",
    ),
    Workload(
        "tiny embedding", "overhead", "embedding", "call overhead", ("mean",), POOL_MODES,
        B=1, V=100, D=8, L=2, draw="uniform",
    ),
)

# One letter varies, the others stay.
GRIDS: dict[str, tuple[int, ...]] = {
    "T": (1, 4, 16, 64, 256, 1024),
    "B": (1, 4, 8, 16, 32, 64, 128),
    "H": (32, 64, 96, 128, 256, 512, 1024),
}
_middle = Workload("scaling", "scaling", "sequence", "a grid around this point", ("lstm",), T=64, B=32, I=256, H=256)
SCALING = tuple(
    replace(_middle, name=f"scaling {axis}", axis=axis, **{axis: value})  # type: ignore[arg-type]
    for axis, values in GRIDS.items()
    for value in values
)
# fmt: on

WORKLOADS = SEQUENCES + CELLS + DEPLOYED + BAGS + EMBEDDINGS + OVERHEAD + SCALING
SUBJECTS = tuple(dict.fromkeys(workload.subject for workload in WORKLOADS))


@functools.lru_cache(maxsize=2)
def word_probabilities(count: int) -> tuple[np.ndarray, str]:
    """How often each of the `count` commonest English words occurs, and where that is known from.

    Beyond wordfreq's list, and without wordfreq, the tail follows Zipf's law.
    """
    try:
        import wordfreq

        counts = np.sort(np.fromiter(wordfreq.get_frequency_dict("en", "best").values(), np.float64))[::-1][:count]
        origin = "words"
    except ImportError:
        counts, origin = 1 / (np.arange(min(count, 1000)) + 2.7), "zipf"
    if count > len(counts):
        counts = np.concatenate([counts, counts[-1] * len(counts) / np.arange(len(counts) + 1, count + 1)])
    return counts / counts.sum(), origin


def draw_origin(workload: Workload) -> str:
    """Where indices truly come from: without wordfreq they are not from words."""
    return word_probabilities(workload.V - 1)[1] if workload.draw == "words" else workload.draw


def draw_indices(workload: Workload, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` rows of the table, never row 0, the padding; in order of frequency, as vocabularies are."""
    if workload.draw == "uniform":
        return rng.integers(1, workload.V, count)
    return 1 + rng.choice(workload.V - 1, count, p=word_probabilities(workload.V - 1)[0])


def draw_lengths(count: int, longest: int, rng: np.random.Generator) -> np.ndarray:
    """Text lengths in descending order: log-normal, as sentences and reviews are, cut at `longest`, which occurs."""
    lengths = rng.lognormal(np.log(max(0.4 * longest, 1)), 0.6, count).round().clip(1, longest).astype(np.int64)
    lengths[0] = longest
    return np.sort(lengths)[::-1].copy()
