"""The release's models as one would write them down from their description: loops over tokens, heads and taps, in float64.

Weights are read from a state dict by the release's own names (Llama: the training tree's). Nothing is shared with ``src``: no layer, no
kernel, no table of names. ``weights(config)`` draws random ones, ``logits(config, state, ids)`` runs them. A configuration is the
release's; for Llama ``half_split: True`` rotates as Hugging Face's does.
Legend: `T` time, `D` model width, `H` heads, `K` key width, `V` value width, `I` hidden width.
"""

from __future__ import annotations

import cmath
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, silu, softplus

EPS = 1e-5


def logits(config: dict[str, Any], state: dict[str, Tensor], ids: Tensor) -> Tensor:
    """``ids [B, T] -> logits [B, T, vocab]``, float64."""
    state = {name: tensor.double() for name, tensor in state.items()}
    return torch.stack([MODELS[config.get("model_name", "Llama")](config, state, row) for row in ids])


# ----------------------------------------------------------------------------------------------------------------------- models


def llama(config, w, ids):
    eps = config.get("norm_eps", EPS)
    x = w["tok_embeddings.weight"][ids]
    for i in range(config["n_layers"]):
        layer = under(w, f"layers.{i}.")
        u = canon(config, "A", layer.get("canonA.weight"), norm(x, layer["attention_norm.weight"], eps))
        x = x + softmax_attention(config, under(layer, "attention."), u, eps)
        u = canon(config, "C", layer.get("canonC.weight"), norm(x, layer["ffn_norm.weight"], eps))
        mlp = under(layer, "feed_forward.")
        gate_up = torch.cat([u @ mlp["w1.weight"].T, u @ mlp["w3.weight"].T], dim=1)
        x = x + gated(canon(config, "D", mlp.get("canonD.weight"), gate_up)) @ mlp["w2.weight"].T
    head = w["tok_embeddings.weight" if config.get("weight_tying") else "output.weight"]
    return norm(x, w["norm.weight"], eps) @ head.T


def linear(config, w, ids):
    mixer = {"GLA5": gla5, "GDN2": gdn2}[config["model_name"]]
    x = w["model.embeddings.weight"][ids]
    for i in range(config["n_layers"]):
        layer = under(w, f"model.layers.{i}.")
        u = canon(config, "A", layer.get("canonA.weight"), norm(x, layer["attn_norm.weight"]))
        x = x + mixer(config, under(layer, "attn."), u)
        u = canon(config, "C", layer.get("canonC.weight"), norm(x, layer["mlp_norm.weight"]))
        if config["model_name"] == "GLA5":
            gate_up = u @ layer["mlp.gate_proj.weight"].T
        elif "D" in config["canon_set"]:
            gate_up = u @ layer["mlp.both_proj.weight"].T
        else:
            gate_up = torch.cat([u @ layer["mlp.gate_proj.weight"].T, u @ layer["mlp.up_proj.weight"].T], dim=1)
        x = x + gated(canon(config, "D", layer.get("mlp.canonD.weight"), gate_up)) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def mamba2(config, w, ids):
    x = w["backbone.embeddings.weight"][ids]
    for i in range(config["n_layers"]):
        layer = under(w, f"backbone.layers.{i}.")
        u = canon(config, "A", layer.get("canonA.weight"), norm(x, layer["norm.weight"]))
        x = x + state_space(config, under(layer, "mixer."), u)
        if config.get("mlp_type") == "mlp10":
            u = canon(config, "C", layer.get("canonC.weight"), norm(x, layer["pre_mlp_layernorm.weight"]))
            gate_up = canon(config, "D", layer.get("mlp.canonD.weight"), u @ layer["mlp.both_proj.weight"].T)
            x = x + gated(gate_up) @ layer["mlp.down_proj.weight"].T
    return norm(x, w["backbone.norm_f.weight"]) @ w["lm_head.weight"].T


MODELS = {"Llama": llama, "LlamaCanon": llama, "GLA5": linear, "GDN2": linear, "Mamba2": mamba2}


# ----------------------------------------------------------------------------------------------------------------------- mixers


def softmax_attention(config, w, u, eps):
    heads = config["n_heads"]
    kv_heads = config.get("n_kv_heads") or heads
    width = config.get("head_dim") or config["dim"] // heads
    q, k, v = (u @ w[f"w{letter}.weight"].T for letter in "qkv")
    if config.get("qk_norm"):
        q, k = norm(q, w["q_norm.weight"], eps), norm(k, w["k_norm.weight"], eps)
    qkv = canon(config, "B", w.get("canonB.weight"), torch.cat([q, k, v], dim=1))
    q, k, v = qkv.split([heads * width, kv_heads * width, kv_heads * width], dim=1)
    rotation = config.get("rope_dim") or width, config.get("rope_theta", 1e4), config.get("half_split", False)
    out = torch.zeros(len(u), heads * width).double()
    for head in range(heads):
        mine = slice(head * width, (head + 1) * width)
        served = head // (heads // kv_heads)
        theirs = slice(served * width, (served + 1) * width)
        queries, keys = (rotate(x, *rotation) for x in (q[:, mine], k[:, theirs]))
        for t in range(len(u)):
            weights = (keys[: t + 1] @ queries[t] / width**0.5).softmax(0)
            out[t, mine] = weights @ v[: t + 1, theirs]
    return out @ w["wo.weight"].T


def rotate(x, rotated, theta, half_split=False):
    """The first coordinates of one head, ``[T, width]``, as complex numbers turned by t * theta^(-2i/r)."""
    out = x.clone()
    for i in range(rotated // 2):
        a, b = (i, i + rotated // 2) if half_split else (2 * i, 2 * i + 1)
        for t in range(len(x)):
            turned = complex(x[t, a], x[t, b]) * cmath.exp(1j * t * theta ** (-2 * i / rotated))
            out[t, a], out[t, b] = turned.real, turned.imag
    return out


def projected(config, w, u):
    """q, k, v of GLA5 and GDN2 after their own convolutions, or after SiLU alone."""
    parts = []
    for name in "qkv":
        x = u @ w[f"{name}_proj.weight"].T
        parts.append(silu(convolve(x, w[f"{name}_conv1d.weight"]) if "b" in config["canon_set"] else x))
    return canon(config, "B", w.get("canonB.weight"), torch.cat(parts, dim=1))


def gla5(config, w, u):
    dim, heads = config["dim"], config["n_heads"]
    width = dim // heads
    q, k, v = projected(config, w, u).split([dim, dim, 2 * dim], dim=1)
    decay = u @ w["gk_proj.0.weight"].T @ w["gk_proj.1.weight"].T + w["gk_proj.1.bias"]
    decay = (logsigmoid(decay) / 16).exp()
    z = u @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    gain = w["g_norm.weight" if config.get("zeyuan_layernorm") else "g_norm_swish_gate.weight"]
    out = torch.zeros(len(u), 2 * dim).double()
    for head in range(heads):
        K, V = slice(head * width, (head + 1) * width), slice(2 * head * width, 2 * (head + 1) * width)
        memory = torch.zeros(width, 2 * width).double()
        for t in range(len(u)):
            memory = decay[t, K, None] * memory + torch.outer(k[t, K], v[t, V])
            out[t, V] = norm(memory.T @ (q[t, K] / width**0.5), gain) * silu(z[t, V])
    return out @ w["o_proj.weight"].T


def gdn2(config, w, u):
    dim, heads = config["dim"], config["n_heads"]
    width = dim // heads
    q, k, v = projected(config, w, u).split([dim, dim, 2 * dim], dim=1)
    beta = (u @ w["b_proj.weight"].T).sigmoid()
    decay = (-w["A_log"].exp() * softplus(u @ w["a_proj.weight"].T + w["dt_bias"])).exp()
    z = u @ w["g_proj.0.weight"].T @ w["g_proj.1.weight"].T + w["g_proj.1.bias"]
    out = torch.zeros(len(u), 2 * dim).double()
    for head in range(heads):
        K, V = slice(head * width, (head + 1) * width), slice(2 * head * width, 2 * (head + 1) * width)
        memory = torch.zeros(width, 2 * width).double()
        for t in range(len(u)):
            key = k[t, K] / (k[t, K].square().sum() + 1e-6).sqrt()
            query = q[t, K] / (q[t, K].square().sum() + 1e-6).sqrt() / width**0.5
            memory = decay[t, head] * memory
            memory = memory + torch.outer(key, beta[t, head] * (v[t, V] - memory.T @ key))
            out[t, V] = norm(memory.T @ query, w["o_norm.weight"]) * silu(z[t, V])
    return out @ w["o_proj.weight"].T


def state_space(config, w, u):
    dim, heads, states = config["dim"], config["n_heads"], config.get("mamba_ssm") or 256
    width = 2 * dim // heads
    everything = canon(config, "B", w.get("canonB.weight"), u @ w["in_proj.weight"].T)
    z, xBC, dt = everything.split([2 * dim, 2 * dim + 2 * states, heads], dim=1)
    if "b" in config["canon_set"]:
        xBC = silu(convolve(xBC, w["conv1d.weight"]) + w["conv1d.bias"])
    x, B, C = xBC.split([2 * dim, states, states], dim=1)
    dt, A = softplus(dt + w["dt_bias"]), -w["A_log"].exp()
    out = torch.zeros(len(u), 2 * dim).double()
    for head in range(heads):
        P = slice(head * width, (head + 1) * width)
        memory = torch.zeros(width, states).double()
        for t in range(len(u)):
            memory = (dt[t, head] * A[head]).exp() * memory + torch.outer(dt[t, head] * x[t, P], B[t])
            out[t, P] = memory @ C[t] + w["D"][head] * x[t, P]
    return norm(out * silu(z), w["norm.weight"]) @ w["out_proj.weight"].T


# ------------------------------------------------------------------------------------------------------------------------ parts


def under(w, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in w.items() if name.startswith(prefix)}


def norm(x, gain, eps=EPS):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * gain


def gated(x):
    gate, up = x.chunk(2, dim=1)
    return silu(gate) * up


def convolve(x, weight):
    """Causal, depthwise, ``[T, width]``; the last tap multiplies the current token."""
    out, taps = torch.zeros_like(x), weight.shape[-1]
    for t in range(len(x)):
        for back in range(min(taps, t + 1)):
            out[t] += weight[:, 0, taps - 1 - back] * x[t - back]
    return out


def canon(config, letter, weight, x):
    if letter not in config.get("canon_set", ""):
        return x
    y = convolve(x, weight)
    y = silu(y) if config.get("canon_activation", False) else y
    return x + y if config.get("canon_residual", True) else y


# ---------------------------------------------------------------------------------------------------------------------- weights


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every weight of a model and its shape, by the release's names."""
    return {"GLA5": linear_shapes, "GDN2": linear_shapes, "Mamba2": mamba2_shapes}.get(
        config.get("model_name", "Llama"), llama_shapes
    )(config)


def llama_shapes(c):
    d, letters, taps, vocabulary = c["dim"], c.get("canon_set", ""), c.get("canon_kernel", 4), c["vocab_size"]
    hidden = c.get("hidden_dim") or -(-(8 * d // 3) // 256) * 256
    width = c.get("head_dim") or d // c["n_heads"]
    q, kv = c["n_heads"] * width, (c.get("n_kv_heads") or c["n_heads"]) * width
    found = {"tok_embeddings.weight": (vocabulary, d), "norm.weight": (d,)}
    if not c.get("weight_tying"):
        found["output.weight"] = (vocabulary, d)
    for i in range(c["n_layers"]):
        a, f = f"layers.{i}.attention.", f"layers.{i}.feed_forward."
        found |= {f"{a}wq.weight": (q, d), f"{a}wk.weight": (kv, d), f"{a}wv.weight": (kv, d), f"{a}wo.weight": (d, q)}
        found |= {f"{f}w1.weight": (hidden, d), f"{f}w3.weight": (hidden, d), f"{f}w2.weight": (d, hidden)}
        found |= {f"layers.{i}.attention_norm.weight": (d,), f"layers.{i}.ffn_norm.weight": (d,)}
        if c.get("qk_norm"):
            found |= {f"{a}q_norm.weight": (q,), f"{a}k_norm.weight": (kv,)}
        places = {"A": (f"layers.{i}.canonA", d), "B": (f"{a}canonB", q + 2 * kv)}
        places |= {"C": (f"layers.{i}.canonC", d), "D": (f"{f}canonD", 2 * hidden)}
        found |= {f"{name}.weight": (size, 1, taps) for letter, (name, size) in places.items() if letter in letters}
    return found


def linear_shapes(c):
    d, heads, letters, taps = c["dim"], c["n_heads"], c["canon_set"], c.get("canon_kernel", 4)
    hidden, vocabulary = c.get("hidden_dim") or 2 * d, c["vocab_size"]
    found = {"model.embeddings.weight": (vocabulary, d), "model.norm.weight": (d,), "lm_head.weight": (vocabulary, d)}
    for i in range(c["n_layers"]):
        layer = f"model.layers.{i}."
        a, m = f"{layer}attn.", f"{layer}mlp."
        found |= {f"{layer}attn_norm.weight": (d,), f"{layer}mlp_norm.weight": (d,)}
        found |= {f"{a}q_proj.weight": (d, d), f"{a}k_proj.weight": (d, d), f"{a}v_proj.weight": (2 * d, d)}
        found |= {f"{a}o_proj.weight": (d, 2 * d), f"{m}down_proj.weight": (d, hidden)}
        found |= {f"{a}g_proj.0.weight": (16, d), f"{a}g_proj.1.weight": (2 * d, 16), f"{a}g_proj.1.bias": (2 * d,)}
        if "b" in letters:
            found |= {f"{a}{x}_conv1d.weight": ((2 * d if x == "v" else d), 1, 4) for x in "qkv"}
        if c["model_name"] == "GLA5":
            found |= {f"{a}gk_proj.0.weight": (16, d), f"{a}gk_proj.1.weight": (d, 16), f"{a}gk_proj.1.bias": (d,)}
            output_norm = "g_norm" if c.get("zeyuan_layernorm") else "g_norm_swish_gate"
            found[f"{a}{output_norm}.weight"] = (2 * d // heads,)
            found[f"{m}gate_proj.weight"] = (2 * hidden, d)
        else:
            found |= {f"{a}a_proj.weight": (heads, d), f"{a}b_proj.weight": (heads, d)}
            found |= {f"{a}A_log": (heads,), f"{a}dt_bias": (heads,), f"{a}o_norm.weight": (2 * d // heads,)}
            if "D" in letters:
                found[f"{m}both_proj.weight"] = (2 * hidden, d)
            else:
                found |= {f"{m}gate_proj.weight": (hidden, d), f"{m}up_proj.weight": (hidden, d)}
        places = {"A": (f"{layer}canonA", d), "B": (f"{a}canonB", 4 * d)}
        places |= {"C": (f"{layer}canonC", d), "D": (f"{m}canonD", 2 * hidden)}
        found |= {f"{name}.weight": (size, 1, taps) for letter, (name, size) in places.items() if letter in letters}
    return found


def mamba2_shapes(c):
    d, heads, letters, taps = c["dim"], c["n_heads"], c["canon_set"], c.get("canon_kernel", 4)
    states, hidden, vocabulary = c.get("mamba_ssm") or 256, c.get("hidden_dim") or 2 * d, c["vocab_size"]
    found = {"backbone.embeddings.weight": (vocabulary, d), "backbone.norm_f.weight": (d,)}
    found["lm_head.weight"] = (vocabulary, d)
    for i in range(c["n_layers"]):
        layer = f"backbone.layers.{i}."
        m, in_width, conv_width = f"{layer}mixer.", 4 * d + 2 * states + heads, 2 * d + 2 * states
        found |= {f"{layer}norm.weight": (d,), f"{m}norm.weight": (2 * d,)}
        found |= {f"{m}in_proj.weight": (in_width, d), f"{m}out_proj.weight": (d, 2 * d)}
        found |= {f"{m}A_log": (heads,), f"{m}D": (heads,), f"{m}dt_bias": (heads,)}
        found[f"{m}conv1d.weight"] = (conv_width, 1, 4)
        if "b" in letters:
            found[f"{m}conv1d.bias"] = (conv_width,)
        places = {"A": (f"{layer}canonA", d), "B": (f"{m}canonB", in_width)}
        if c.get("mlp_type") == "mlp10":
            found[f"{layer}pre_mlp_layernorm.weight"] = (d,)
            found |= {f"{layer}mlp.both_proj.weight": (2 * hidden, d), f"{layer}mlp.down_proj.weight": (d, hidden)}
            places |= {"C": (f"{layer}canonC", d), "D": (f"{layer}mlp.canonD", 2 * hidden)}
        found |= {f"{name}.weight": (size, 1, taps) for letter, (name, size) in places.items() if letter in letters}
    return found


def weights(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random float32 weights, spread so that every one of them matters."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, shape in shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            found[name] = (noise.abs() * 8).log()
        elif name.endswith("dt_bias"):
            found[name] = noise - 3
        elif "norm" in name:
            found[name] = 1 + 0.2 * noise
        elif "mixer.conv1d.weight" in name and "b" not in config["canon_set"]:
            found[name] = torch.zeros(shape)
        else:
            found[name] = noise * {1: 0.5, 2: shape[-1] ** -0.5, 3: 0.3}[len(shape)]
    return found
