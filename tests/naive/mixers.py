"""The linear mixers by their equations, token by token in numpy: one row x [T, D] through one mixer's weights by name.

Options are what the equations leave open: ``letters`` of the Canon points, heads, and so on.
"""

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(-np.abs(x))) + np.maximum(x, 0)


def convolve(x, weight, bias=0.0):
    """The token itself has the last tap; what came before the first token is zero."""
    taps = weight.shape[-1]
    y = np.zeros_like(x)
    for t in range(len(x)):
        for back in range(min(t, taps - 1) + 1):
            y[t] += weight[:, 0, taps - 1 - back] * x[t - back]
    return y + bias


def rms(x, gain, eps=1e-5):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * gain


def projected(w, x, letters, activation, key_width):
    qkv = x @ w["qkv_proj.weight"].T
    if "b" in letters:
        qkv = silu(convolve(qkv, w["conv_b.weight"]))
    elif activation:
        qkv = silu(qkv)
    if "B" in letters:
        qkv = qkv + convolve(qkv, w["canon_b.weight"])
    return qkv[:, :key_width], qkv[:, key_width : 2 * key_width], qkv[:, 2 * key_width :]


def gated(w, x, o, value_dim):
    """o [T, H, V] -> [T, D]: each head's norm with one gain, then the gate."""
    if "gate_proj.weight" in w:
        z = x @ w["gate_proj.weight"].T
    else:
        z = x @ w["gate_in.weight"].T @ w["gate_out.weight"].T + w["gate_out.bias"]
    heads = rms(o, w["norm.weight"]).reshape(len(x), -1)
    assert o.shape[-1] == value_dim
    return (heads * silu(z)) @ w["out_proj.weight"].T


def gla(w, x, *, letters, heads, activation=False, elu=False, normalizer=16.0):
    key_width, value_width = w["decay_out.bias"].shape[0], w["out_proj.weight"].shape[1]
    dk, dv = key_width // heads, value_width // heads
    q, k, v = projected(w, x, letters, activation, key_width)
    if elu:
        q, k = (np.where(p > 0, p + 1, np.exp(np.minimum(p, 0))) for p in (q, k))
    g = np.log(sigmoid(x @ w["decay_in.weight"].T @ w["decay_out.weight"].T + w["decay_out.bias"])) / normalizer
    o = np.zeros((len(x), heads, dv))
    for h in range(heads):
        key, value, memory = slice(h * dk, (h + 1) * dk), slice(h * dv, (h + 1) * dv), np.zeros((dk, dv))
        for t in range(len(x)):
            memory = np.diag(np.exp(g[t, key])) @ memory + np.outer(k[t, key], v[t, value])
            o[t, h] = memory.T @ q[t, key] / np.sqrt(dk)
    return gated(w, x, o, dv)


def gated_deltanet(w, x, *, letters, heads):
    value_width = w["out_proj.weight"].shape[1]
    key_width = (w["qkv_proj.weight"].shape[0] - value_width) // 2
    dk, dv = key_width // heads, value_width // heads
    q, k, v = projected(w, x, letters, True, key_width)
    beta = sigmoid(x @ w["beta_proj.weight"].T)
    g = -np.exp(w["A_log"]) * softplus(x @ w["decay_proj.weight"].T + w["dt_bias"])
    o = np.zeros((len(x), heads, dv))
    for h in range(heads):
        key, value, memory = slice(h * dk, (h + 1) * dk), slice(h * dv, (h + 1) * dv), np.zeros((dk, dv))
        for t in range(len(x)):
            q_t, k_t = (p[t, key] / np.sqrt((p[t, key] ** 2).sum() + 1e-6) for p in (q, k))
            memory = np.exp(g[t, h]) * memory
            memory = memory + np.outer(k_t, beta[t, h] * (v[t, value] - memory.T @ k_t))
            o[t, h] = memory.T @ q_t / np.sqrt(dk)
    return gated(w, x, o, dv)


def mamba2(w, x, *, letters, heads, state, groups=1):
    inner = w["out_proj.weight"].shape[1]
    width = inner // heads
    all_of_it = x @ w["in_proj.weight"].T
    if "B" in letters:
        all_of_it = all_of_it + convolve(all_of_it, w["canon_b.weight"])
    z, xbc, dt = np.split(all_of_it, [inner, 2 * inner + 2 * groups * state], axis=1)
    if "b" in letters:
        xbc = silu(convolve(xbc, w["conv_b.weight"], w["conv_b.bias"]))
    u, b, c = np.split(xbc, [inner, inner + groups * state], axis=1)
    dt = softplus(dt + w["dt_bias"])
    y = np.zeros_like(u)
    for h in range(heads):
        part, memory, group = slice(h * width, (h + 1) * width), np.zeros((width, state)), h // (heads // groups)
        shared = slice(group * state, (group + 1) * state)
        for t in range(len(x)):
            memory = np.exp(-dt[t, h] * np.exp(w["A_log"][h])) * memory + dt[t, h] * np.outer(u[t, part], b[t, shared])
            y[t, part] = memory @ c[t, shared] + w["D"][h] * u[t, part]
    return rms(y * silu(z), w["norm.weight"]) @ w["out_proj.weight"].T


def linear_attention(w, x, *, letters, heads):
    """As attention: every token looks at all tokens before it, with weights phi(q) . phi(k) that are made to sum to 1."""
    dim = x.shape[1]
    qkv = x @ w["qkv_proj.weight"].T
    if "B" in letters:
        qkv = qkv + convolve(qkv, w["canon_b.weight"])
    q, k, v = np.split(qkv, 3, axis=1)
    q, k = (np.where(p > 0, p + 1, np.exp(np.minimum(p, 0))) for p in (q, k))
    o, width = np.zeros((len(x), dim)), dim // heads
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        for t in range(len(x)):
            scores = k[: t + 1, part] @ q[t, part]
            o[t, part] = scores @ v[: t + 1, part] / (scores.sum() + 1e-6)
    return o @ w["out_proj.weight"].T
