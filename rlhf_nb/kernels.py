"""Fast paths of the models: fused layers, log-probs without logits, packed weights and a cache for generation.

No result changes beyond rounding: `tests/test_kernels.py` compares all with the plain computation.
"""
import inspect
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from accelerate.utils.memory import clear_device_cache
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUTanh, SiLUActivation
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.bloom.modeling_bloom import BloomAttention, BloomMLP, BloomModel, build_alibi_tensor
from transformers.models.deberta_v2.modeling_deberta_v2 import DisentangledSelfAttention
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from .distributed import is_gathered

if TYPE_CHECKING:
    from .models import Sampling

logger = logging.getLogger(__name__)

# Fused layers

class _Attention(torch.autograd.Function):
    "Attention as matrix products: on a CPU, the backward pass of PyTorch's own takes four times as long."
    @staticmethod
    def forward(ctx, qkv, bias, scale, heads):
        parts = split_heads(qkv, heads)
        q, k, v = parts.flatten(1, 2)
        p = torch.baddbmm(bias.expand(-1, heads, -1, -1).flatten(0, 1), q, k.transpose(1, 2), alpha=scale).softmax(-1)
        ctx.save_for_backward(parts, p)
        ctx.scale = scale
        return (p @ v).view_as(parts[0]).transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx, grad):
        parts, p = ctx.saved_tensors
        q, k, v = parts.flatten(1, 2)
        grad = grad.unflatten(2, (parts.shape[2], -1)).transpose(1, 2).flatten(0, 1)
        # No public function computes it in one pass
        scores = torch._softmax_backward_data(grad @ v.transpose(1, 2), p, -1, p.dtype)
        dq = torch.baddbmm(q, scores, k, beta=0, alpha=ctx.scale)
        dk = torch.baddbmm(k, scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        out = torch.stack([dq, dk, p.transpose(1, 2) @ grad]).view_as(parts)
        return out.permute(1, 3, 2, 0, 4).flatten(2), None, None, None


def split_heads(qkv: Tensor, # As BLOOM computes it, (B, N, heads * 3 * size)
                heads: int,
) -> Tensor:                 # (3, B, heads, N, size)
    "Query, key and value."
    return qkv.unflatten(2, (heads, 3, -1)).permute(3, 0, 2, 1, 4).contiguous()


class FusedBloomModel(BloomModel):
    "BLOOM with ALiBi in float32, of which a pass makes one bias for all layers."
    def build_alibi_tensor(self, attention_mask, num_heads, dtype):
        return build_alibi_tensor(attention_mask, num_heads, torch.float32)


def attention_bias(alibi: Tensor,       # Slopes times positions, float32, (B * heads, 1, N); keeps the result
                   mask: Tensor | None, # 0, or the lowest number, (B, 1, Q, N)
                   qkv: Tensor,         # (B, Q, ...)
                   heads: int,
) -> Tensor:                            # In the type of `qkv`, (B, heads, Q, N)
    "ALiBi plus mask, relative to the query: values near it are small, so 16 bits suffice."
    if "bias" not in vars(alibi):
        n, queries = qkv.shape[:2]
        bias = alibi.view(n, heads, 1, -1).float()
        bias = bias - (bias[..., -queries:].mT if queries > 1 else bias.amax(-1, keepdim=True))
        if mask is not None: bias = bias + mask
        # The mask's lowest number must not become minus infinity, or padding is NaN
        alibi.bias = bias.clamp(min=torch.finfo(qkv.dtype).min).to(qkv.dtype)
    return alibi.bias


class SdpaBloomAttention(BloomAttention):
    "BLOOM's attention through `scaled_dot_product_attention`; ALiBi and the mask are its bias."
    def forward(self, hidden_states, residual, alibi, attention_mask, layer_past=None, use_cache=False, **kwargs):
        qkv = self.query_key_value(hidden_states)
        bias = attention_bias(alibi, attention_mask, qkv, self.num_heads)
        scale = self.inv_norm_factor
        if layer_past is None and qkv.device.type == "cpu":
            out = _Attention.apply(qkv, bias, scale, self.num_heads)
        else:
            q, k, v = self._reshape(qkv)
            if layer_past is not None: k, v = layer_past.update(k, v, self.layer_idx)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale).transpose(1, 2).flatten(2)
        return residual + F.dropout(self.dense(out), self.hidden_dropout, self.training), None


class _GroupedAttention(torch.autograd.Function):
    "Attention as matrix products, one for all heads that share keys and values: these are not repeated."
    @staticmethod
    def forward(ctx, q, k, v, mask, scale): # (B, heads, Q, size), (B, groups, N, size); True where it attends, or added
        ctx.shapes = shape, *_ = [x.shape for x in (q, k, v)]
        ctx.scale, N = scale, k.shape[2]
        # Views of a cache would be copied for each product
        if not any(ctx.needs_input_grad) and hasattr(k, "whole") and hasattr(v, "whole"): k, v = k.whole, v.whole
        k, v = (x.flatten(0, 1).contiguous() for x in (k, v))
        q = q.reshape(len(k), -1, q.shape[3])
        wide = torch.promote_types(q.dtype, torch.float32) # Large scores, rounded to 16 bits, would be off by tenths
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.bmm(q.to(wide), k.to(wide).transpose(1, 2)).mul_(scale)
        if mask is not None or k.shape[1] > N:
            parts = scores.view(*shape[:3], -1)
            lowest = torch.finfo(parts.dtype).min
            parts[..., N:] = lowest
            some = parts[..., :N]
            if mask is None: pass
            elif mask.dtype == torch.bool: some.masked_fill_(~mask, lowest)
            else: some.add_(mask).clamp_(min=lowest) # A row that sees nothing would be NaN
        p = scores.softmax(-1).to(v.dtype)
        ctx.save_for_backward(q, k, v, p)
        return (p @ v).view(*shape[:3], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        grad = grad.reshape(len(q), q.shape[1], -1)
        # No public function computes it in one pass
        scores = torch._softmax_backward_data(grad @ v.transpose(1, 2), p, -1, p.dtype)
        dq = torch.baddbmm(q, scores, k, beta=0, alpha=ctx.scale)
        dk = torch.baddbmm(k, scores.transpose(1, 2), q, beta=0, alpha=ctx.scale)
        found = dq, dk, p.transpose(1, 2) @ grad
        return *(x.view(shape) for x, shape in zip(found, ctx.shapes)), None, None


def on_cpu(x: Tensor) -> bool: # The plan of a run on a GPU replaces this function
    "Is it there?"
    return x.device.type == "cpu"


ATTENTION = "grouped" # Its name among transformers' attention functions
FEW = 2 ** 16         # Queries times keys, up to which products are faster than the fused kernel of a CPU


def grouped_attention(module: nn.Module,
                      query: Tensor,  # (B, heads, Q, size)
                      key: Tensor,    # (B, groups of heads, N, size)
                      value: Tensor,
                      attention_mask: Tensor | None,
                      dropout: float = 0.,
                      scaling: float | None = None,
                      is_causal: bool | None = None,
                      **kwargs,
) -> tuple[Tensor, None]:             # (B, Q, heads, size)
    "Transformers' `sdpa`, on a CPU with few tokens as matrix products: the fused kernel takes 3 to 10 times as long."
    Q, N = query.shape[2], key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and attention_mask is None and Q > 1
    asks = dropout or any(kwargs.get(name) is not None for name in ("cache", "position_bias", "softcap"))
    learned = attention_mask is not None and attention_mask.requires_grad
    same = len(query) == len(key) and (Q == N or not causal)
    fast = on_cpu(query) and same and not (asks or learned)
    one = fast and Q == 1 and query.shape[1] > key.shape[1] # With a mask, `sdpa` takes a tenth of its time
    if one and attention_mask is None: attention_mask = torch.ones(1, 1, 1, N, dtype=torch.bool)
    if one or not fast or Q * N > FEW:
        given = kwargs | dict(dropout=dropout, scaling=scaling, is_causal=is_causal)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)
    if causal: attention_mask = torch.ones(Q, N, dtype=torch.bool, device=query.device).tril()
    if scaling is None: scaling = query.shape[3] ** -.5
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    out = _GroupedAttention.apply(*(x.to(dtype) for x in (query, key, value)), attention_mask, scaling)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, grouped_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def packs(weight: Tensor) -> bool:
    "Does oneDNN have a faster product for it, which can include an activation?"
    half = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return half and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def trains(layer: nn.Module) -> bool:
    "Is any of its parameters trained?"
    return any(p.requires_grad for p in layer.parameters())


class _LinearGelu(torch.autograd.Function):
    "The backward pass uses the slope of GELU's erf form: half the work, and the same within bfloat16's rounding."
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "tanh")

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, F.linear(x, weight, bias)) @ weight, None, None


class FusedBloomMLP(BloomMLP):
    "BLOOM's MLP with the first layer and GELU in one operation."
    def forward(self, hidden_states, residual):
        return residual + F.dropout(self.dense_4h_to_h(self.up(hidden_states)), self.hidden_dropout, self.training)

    def up(self, x: Tensor) -> Tensor: # (..., H) to (..., 4 H)
        "The first layer and GELU."
        layer = self.dense_h_to_4h
        plain = type(layer) is nn.Linear and "forward" not in vars(layer) and not trains(layer)
        if plain and packs(layer.weight) and x.dtype == layer.weight.dtype:
            return _LinearGelu.apply(x, layer.weight, layer.bias)
        return F.gelu(layer(x), approximate="tanh")


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale): # Rows, (n, in)
        a = a.to(x.dtype)
        b = b.to(x.dtype)
        low = x @ a.T
        ctx.save_for_backward(x, weight, a, b, low)
        ctx.scale = scale
        return F.linear(x, weight, bias).addmm_(low, b.T, alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, weight, a, b, low = ctx.saved_tensors
        back = (grad @ b).mul_(ctx.scale)
        dx = (grad @ weight).addmm_(back, a) if ctx.needs_input_grad[0] else None
        return dx, None, None, back.T @ x, (grad.T @ low).mul_(ctx.scale), None


class FusedLora(LoraLinear):
    "LoRA around a frozen linear layer as two small products; all other cases are left to peft."
    def forward(self, x, *args, **kwargs):
        if kwargs or not self.is_plain(x.device.type): return super().forward(x, *args, **kwargs)
        name = self.active_adapters[0]
        base = self.base_layer
        rows = x.to(base.weight.dtype).flatten(0, -2)
        adapter = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        out = _LoraLinear.apply(rows, base.weight, base.bias, *adapter)
        return out.view(*x.shape[:-1], -1)

    def is_plain(self, device_type: str) -> bool:
        "Does the fused product compute it?"
        if self.disable_adapters or self.merged or not mergeable(self) or len(self.active_adapters) != 1: return False
        name = self.active_adapters[0]
        if name not in self.lora_A or self.lora_dropout[name].training or trains(self.base_layer): return False
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else self.lora_A[name].weight.dtype
        return self.base_layer.weight.dtype == dtype


class StridedAttention(DisentangledSelfAttention):
    "DeBERTa's attention; terms that depend on distance are found by strides in place of `gather`."
    def disentangled_attention_bias(self, query_layer, key_layer, relative_pos, rel_embeddings, scale_factor):
        n = key_layer.shape[1]
        distances = relative_pos.view(n, n)
        distances = torch.cat([distances[1:, 0].flip(0), distances[0]])
        bias = 0.
        if "c2p" in self.pos_att_type:
            bias = self.by_distance(query_layer, "key", rel_embeddings, distances, scale_factor)
        if "p2c" in self.pos_att_type:
            transposed = self.by_distance(key_layer, "query", rel_embeddings, -distances, scale_factor)
            bias = bias + transposed.transpose(1, 2)
        return bias

    def by_distance(self,
                    x: Tensor,              # Queries or keys, (B * heads, n, size)
                    kind: str,              # Of the other: key or query
                    rel_embeddings: Tensor, # (distances that have one, H)
                    distances: Tensor,      # n - 1 to 1 - n, in the order of their rows, (2 n - 1,)
                    scale_factor: int,
    ) -> Tensor:                            # (B * heads, n, n)
        "Scaled product of each token i with the relative position of distance i - j, for each token j."
        place = (distances + self.pos_ebd_size).clamp(0, len(rel_embeddings) - 1)
        project = getattr(self, f"{kind}_proj" if self.share_att_key else f"pos_{kind}_proj")
        few = len(place) < len(rel_embeddings)
        rows = project(rel_embeddings[place]) if few else project(rel_embeddings)[place]
        rows = rows.unflatten(1, (self.num_attention_heads, -1)).transpose(0, 1) / math.sqrt(x.shape[2] * scale_factor)
        products = x @ rows.repeat(len(x) // len(rows), 1, 1).transpose(1, 2)
        n = x.shape[1]
        return products.as_strided((len(x), n, n), (products.stride(0), 2 * n - 2, 1), n - 1)


def rms_norm(x: Tensor,     # (..., H)
             scale: Tensor, # float32, (H,)
             eps: float,
) -> tuple[Tensor, Tensor]: # In the type of `x`; the inverse of its root mean square, float32, (..., 1)
    "Zhang and Sennrich 2019, eq. 4, rounded once."
    inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scale.dtype)
    inverse = inverse.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x * inverse, scale, out=torch.empty_like(x)), inverse


class _RMSNorm(torch.autograd.Function):
    "Keeps its input in its own type; autograd keeps it in float32."
    @staticmethod
    def forward(ctx, x, scale, eps):
        out, inverse = rms_norm(x, scale, eps)
        ctx.save_for_backward(x, scale, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, scale, inverse = ctx.saved_tensors
        x_hat = x * inverse
        of_scale = (grad * x_hat).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * scale
        mean = torch.linalg.vecdot(grad, x_hat)[..., None] / x.shape[-1]
        return torch.addcmul(grad, x_hat, mean, value=-1).mul_(inverse).to(x.dtype), of_scale, None


class FusedRMSNorm:
    "Before an RMSNorm among a class's bases: it keeps half of the memory for the backward pass."
    offset = 0 # Added to the weight

    def forward(self, x):
        weight = self.weight
        if not on_cpu(x) or weight.dtype != x.dtype: return super().forward(x)
        scale = weight.to(torch.promote_types(x.dtype, torch.float32)) + self.offset
        eps = self.eps if self.offset else self.variance_epsilon
        # The same numbers with and without a gradient, or the first ratio is not 1
        return _RMSNorm.apply(x, scale, eps) if torch.is_grad_enabled() else rms_norm(x, scale, eps)[0]


class FusedGemmaNorm(FusedRMSNorm):
    "Gemma's weight is the difference from 1."
    offset = 1


class _Gated(torch.autograd.Function):
    "Keeps its two inputs; autograd keeps the activation as well. Slope of GELU: see `_LinearGelu`."
    @staticmethod
    def forward(ctx, gate, up, gelu):
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        if not ctx.gelu:
            return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad), None
        exact = "none" if gate.dtype == torch.bfloat16 else "tanh"
        slope = torch.ops.aten.gelu_backward(grad * up, gate, approximate=exact)
        return slope, F.gelu(gate, approximate=exact).mul_(grad), None


class FusedGatedMLP:
    "Before a gated MLP among a class's bases: fewer activations are kept for the backward pass."
    def forward(self, x):
        act, gate, up = self.act_fn, self.gate_proj(x), self.up_proj(x)
        known = type(act) in (GELUTanh, SiLUActivation, nn.SiLU) and gate.dtype == up.dtype
        changed = act._forward_hooks or act._forward_pre_hooks or "forward" in vars(act)
        if changed or not known: return self.down_proj(act(gate) * up)
        return self.down_proj(_Gated.apply(gate, up, type(act) is GELUTanh))


FUSED = {BloomModel: FusedBloomModel, BloomAttention: SdpaBloomAttention, BloomMLP: FusedBloomMLP,
         LoraLinear: FusedLora, DisentangledSelfAttention: StridedAttention}
COPIED = {LlamaRMSNorm: FusedRMSNorm, Olmo2RMSNorm: FusedRMSNorm, Gemma3RMSNorm: FusedGemmaNorm,
          LlamaMLP: FusedGatedMLP} # Layers whose code transformers repeats under other names
COMPARED = "forward", "_norm"


def same_code(one: type, other: type) -> bool:
    "Have two classes methods of their own with the same names and code?"
    def methods(kind: type) -> dict:
        found = {name: f.__code__ for name, f in vars(kind).items() if isinstance(f, FunctionType)}
        return {name: (code.co_code, code.co_consts, code.co_names) for name, code in found.items() if name in COMPARED}
    return methods(one) == methods(other)


@cache
def fused(kind: type) -> type:
    "The faster kind of a layer; the same where there is none."
    if kind in FUSED: return FUSED[kind]
    found = next((new for known, new in COPIED.items() if same_code(kind, known)), None)
    return type(kind.__name__, (found, kind), dict(__reduce_ex__=as_stock)) if found else kind


def fused_instance(kind: type) -> nn.Module: # Without its state
    "An instance of the faster kind of a layer."
    new = fused(kind)
    return new.__new__(new)


def as_stock(layer: nn.Module, protocol: int) -> tuple:
    "Pickle a layer of a class that `fused` has made as the class of transformers behind it."
    return fused_instance, (type(layer).__bases__[1],), vars(layer)


@cache
def takes_attention(kind: type[PreTrainedModel]) -> bool:
    "Does its code leave attention to the function that the configuration names, without asking for `sdpa` by name?"
    if not kind._can_set_attn_implementation(): return False
    return '"sdpa"' not in inspect.getsource(sys.modules[kind.__module__])


def fuse_layers(model: nn.Module) -> nn.Module: # The same
    "Replace `sdpa` and the layers of `FUSED` and `COPIED` by faster ones; weights and other layers stay."
    for m in model.modules(): m.__class__ = fused(type(m))
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    takes = (m.config._attn_implementation == "sdpa" and takes_attention(type(m)) for m in parts)
    if parts and parts[0].device.type == "cpu" and all(takes):
        parts[0].set_attn_implementation(ATTENTION)
    return model


# What 16 bits cannot hold

def in_float32(embedding: nn.Module, args: tuple, out: Tensor) -> Tensor:
    "A hook: embeddings in float32 where products are in float16."
    half = out.dtype == torch.float16 and torch.is_autocast_enabled(out.device.type)
    return out.float() if half else out


def widen_residual_stream(lm: PreTrainedModel | PeftModel):
    "In float16 autocast, sum layers in float32: the sum may exceed 65504, and it keeps the type of the embeddings."
    embedding = lm.get_input_embeddings()
    if in_float32 not in embedding._forward_hooks.values(): embedding.register_forward_hook(in_float32)


@cache
def has_float32_products(device_type: str, dtype: torch.dtype) -> bool:
    "Does the device multiply matrices of this type with a result in float32? Of those that PyTorch has, a GPU does."
    if device_type != "cuda" or dtype.itemsize != 2: return False
    x = torch.zeros(16, 16, dtype=dtype, device=device_type)
    try: torch.mm(x, x, out_dtype=torch.float32)
    except (NotImplementedError, RuntimeError, TypeError): return False
    return True


def float32_product(x: Tensor,    # (n, k)
                    y: Tensor,    # (k, m), of the same type
) -> Tensor:                      # (n, m), of `product_dtype`
    "The product of two matrices, not rounded to 16 bits."
    if has_float32_products(x.device.type, x.dtype): return torch.mm(x, y, out_dtype=torch.float32)
    return x @ y


def product_dtype(x: Tensor) -> torch.dtype:
    "The type of `float32_product`: float32 where the device has such products, else autocast's, else that of `x`."
    device_type = x.device.type
    if has_float32_products(device_type, x.dtype): return torch.float32
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight): # (n, H), (V, H)
        ctx.save_for_backward(weight)
        return float32_product(hidden, weight.T)

    @staticmethod
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        return grad.to(weight.dtype) @ weight, None


@contextmanager
def float32_logits(lm: PreTrainedModel | PeftModel) -> Iterator[None]:
    "Inside, a frozen linear output layer computes float32 logits, where the device has such products."
    head = lm.get_output_embeddings()
    plain = type(head) is nn.Linear and not trains(head) and "forward" not in vars(head)
    if not (plain and has_float32_products(head.weight.device.type, head.weight.dtype)): return (yield)

    def forward(hidden: Tensor) -> Tensor:
        rows = hidden.to(head.weight.dtype).flatten(0, -2)
        logits = _Logits.apply(rows, head.weight).view(*hidden.shape[:-1], -1)
        return logits if head.bias is None else logits + head.bias

    with replaced_head(lm, forward): yield


# Log-probs

class _TokenLogprobs(torch.autograd.Function):
    "The gradient has a closed form, one-hot minus softmax: two passes over the vocabulary where autograd takes seven."
    @staticmethod
    def forward(ctx, logits, ids):
        total = logits.logsumexp(-1)
        ctx.save_for_backward(logits, ids, total)
        return logits.gather(-1, ids[..., None])[..., 0] - total

    @staticmethod
    def backward(ctx, grad):
        logits, ids, total = ctx.saved_tensors
        out = (logits - total[..., None]).exp_().mul_(-grad[..., None])
        return out.scatter_add_(-1, ids[..., None], grad[..., None]), None


def token_logprobs(logits: Tensor, # (B, T, V), float32
                   ids: Tensor,    # The sampled tokens, (B, T)
) -> Tensor:                       # (B, T)
    "Log-probability of each sampled token."
    return _TokenLogprobs.apply(logits, ids)


class _TokenEntropy(torch.autograd.Function):
    "The gradient is -p (log p + entropy)."
    @staticmethod
    def forward(ctx, logits):
        total = logits.logsumexp(-1)
        entropy = total - (logits.softmax(-1) * logits).sum(-1)
        ctx.save_for_backward(logits, total, entropy)
        return entropy

    @staticmethod
    def backward(ctx, grad):
        logits, total, entropy = ctx.saved_tensors
        logp = logits - total[..., None]
        return logp.exp().mul_(logp.add_(entropy[..., None])).mul_(-grad[..., None])


def token_entropy(logits: Tensor, # (B, T, V), float32
) -> Tensor:                      # In nats, (B, T)
    "Entropy of the distribution at each position."
    return _TokenEntropy.apply(logits)


# Log-probs without logits

CHUNK = 2 ** 28 # Bytes of the output layer's logits that exist at once
BLOCK = 2 ** 19 # Of these, in float32, on a CPU: what its cache holds


def score_chunk(hidden: Tensor,                       # (n, H)
                ids: Tensor,                          # The sampled tokens, (n,)
                early: Tensor,                        # True before the minimum length, (n,)
                space: Tensor | None,                 # For their logits, (n or more, V); None: new
                head: nn.Linear,                      # The output layer, H to V
                sampling: "Sampling",
                with_entropy: bool,
                with_grad: bool,
) -> tuple[Tensor | None, ...]: # Log-probs and entropy, (n,), and the gradient of each for the hidden state, (n, H)
    "`head_logprobs` of a few tokens."
    weight = head.weight
    if space is None: logits = float32_product(hidden, weight.T)
    else: logits = torch.mm(hidden, weight.T, out=space[:len(hidden)])
    if head.bias is not None: logits += head.bias
    for eos in sampling.eos_token_ids: logits[:, eos].masked_fill_(early, torch.finfo(logits.dtype).min / 2)
    deviation = torch.empty_like(logits) if with_entropy and with_grad else None
    sampled, total, mean = hidden.new_empty(3, len(hidden), 1, dtype=torch.float32)
    block = BLOCK if on_cpu(hidden) else CHUNK // 4
    rows = max(1, block // len(weight))
    for start in range(0, len(hidden), rows):
        some = slice(start, start + rows)
        x = logits[some].float()
        if sampling.temperature != 1: x.div_(sampling.temperature)
        x.sub_(x.amax(-1, keepdim=True))
        sampled[some] = x.gather(-1, ids[some, None])
        p = x.exp() if with_entropy else x.exp_()
        total[some] = p.sum(-1, keepdim=True)
        if with_entropy: mean[some] = torch.linalg.vecdot(p, x)[:, None] / total[some]
        if deviation is not None: deviation[some] = x.sub_(mean[some]).mul_(p)
        if with_grad: logits[some] = p

    def direction(own: Tensor | float, factors: Tensor) -> Tensor:
        found = own - float32_product(factors.to(weight.dtype), weight) / total
        return (found / sampling.temperature).to(hidden.dtype)

    grad = direction(weight[ids], logits) if with_grad else None
    entropy_grad = None if deviation is None else direction(0., deviation)
    entropy = (total.log() - mean)[:, 0] if with_entropy else None
    return (sampled - total.log())[:, 0], entropy, grad, entropy_grad


class _HeadLogprobs(torch.autograd.Function):
    "The forward pass finds the gradient for the hidden state, up to a factor: no logits are kept."
    @staticmethod
    def forward(ctx, hidden, head, ids, early, sampling, with_entropy):
        weight, dtype = head.weight, product_dtype(head.weight)
        most = max(1, CHUNK // (head.out_features * dtype.itemsize))
        count = max(1, math.ceil(len(hidden) / most))
        rows = max(1, math.ceil(len(hidden) / count)) # Of chunks of the same size
        # On a CPU, memory that is used again; new memory would cost half of the product's time. Autocast ignores `out`
        again = on_cpu(weight) and dtype == weight.dtype
        space = weight.new_empty(rows, head.out_features) if again else None
        chunks = zip(*(x.split(rows) for x in (hidden, ids, early)))
        parts = [score_chunk(*chunk, space, head, sampling, with_entropy, ctx.needs_input_grad[0]) for chunk in chunks]
        logprobs, entropy, *directions = (None if column[0] is None else torch.cat(column) for column in zip(*parts))
        ctx.save_for_backward(*directions)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad, grad_entropy):
        pairs = zip((grad, grad_entropy), ctx.saved_tensors)
        total = sum(g[:, None] * direction for g, direction in pairs if g is not None)
        return total, None, None, None, None, None


def head_logprobs(hidden: Tensor,        # Input of the output layer, (n, H)
                  head: nn.Linear,       # Frozen
                  ids: Tensor,           # The sampled tokens, (n,)
                  early: Tensor,         # True before the minimum length, (n,)
                  sampling: "Sampling",
                  entropy: bool = False, # Compute it as well
) -> tuple[Tensor, Tensor | None]:       # Log-probs and entropy, float32, (n,)
    "`token_logprobs` and `token_entropy` of the sampling logits, a few tokens at a time."
    return _HeadLogprobs.apply(hidden.to(head.weight.dtype), head, ids, early, sampling, entropy)


@contextmanager
def replaced_head(lm: PreTrainedModel | PeftModel,
                  forward: Callable[[Tensor], Tensor], # Hidden states to logits
) -> Iterator[None]:
    "Inside, the output layer computes something else."
    head = lm.get_output_embeddings()
    head.forward = forward
    try: yield
    finally: del head.forward


@torch.no_grad()
def head_is_plain(lm: PreTrainedModel | PeftModel) -> bool:
    "Is the output layer linear and frozen, and its result the logits? Tested with a constant output layer."
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.requires_grad or "forward" in vars(head): return False
    weight = head.weight
    known = torch.linspace(-1e3, 1e3, len(weight), dtype=weight.dtype, device=weight.device)
    with replaced_head(lm, lambda hidden: known.expand(*hidden.shape[:-1], -1)):
        logits = lm(input_ids=known.new_zeros(1, 1, dtype=torch.long), use_cache=False).logits
    return (logits == known).all().item()


# Generation

def packed_linear(weight: Tensor,      # (out, in)
                  bias: Tensor | None, # (out,)
                  rows: int,           # Of its input, usually
                  gelu: bool = False,  # Apply GELU in its tanh form
) -> Callable[[Tensor], Tensor]:
    "The linear layer as a function of few rows; packed by oneDNN where that is faster."
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if packs(weight) else None
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")

    def forward(x: Tensor) -> Tensor:
        x = x.to(weight.dtype)
        if packed is not None: return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *activation)
        out = F.linear(x, weight, bias)
        return F.gelu(out, approximate="tanh") if gelu else out
    return forward


def merged_weight(layer: FusedLora) -> Tensor: # (out, in)
    "The weight, with the change of the active adapters."
    weight = layer.weight.detach()
    if layer.disable_adapters or layer.merged: return weight
    changes = (layer.get_delta_weight(a).float() for a in layer.active_adapters if a in layer.lora_A)
    return sum(changes, weight.float()).to(weight.dtype)


def mergeable(layer: nn.Module) -> bool:
    "Is it a LoRA layer whose change is one matrix?"
    if type(layer) is not FusedLora or layer.lora_variant or type(layer.base_layer) is not nn.Linear: return False
    return all(b.bias is None for b in layer.lora_B.values())


def float32_norm(layer: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    "The layer as a function with float32 weights, which autocast on a GPU would make for each token."
    bias = None if layer.bias is None else layer.bias.detach().float()
    weight = layer.weight.detach().float()

    def forward(x: Tensor) -> Tensor: return F.layer_norm(x.float(), layer.normalized_shape, weight, bias, layer.eps)
    return forward


MERGED_SHARE = .1 # Share of a GPU's memory that merged weights may take


def gpu_memory(device: torch.device) -> float | None: # Bytes; the plan of a run on a GPU replaces this function
    "All of a GPU's memory; None for other devices."
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def merged_weights(layers: list[FusedLora]) -> dict[FusedLora, Tensor]: # Of each, (out, in)
    "Weights with the change of the adapters; none of them where memory does not suffice."
    try: return {m: merged_weight(m) for m in layers}
    except torch.OutOfMemoryError: logger.info("LoRA is not merged while sampling, for lack of memory")
    clear_device_cache(garbage_collection=True)
    return {}


@contextmanager
def packed_for_generation(lm: PreTrainedModel, # Without peft's wrapper
                          rows: int,           # Sequences that are generated at once
) -> Iterator[None]:
    "Inside, LoRA is merged into copies of the weights, on a CPU packed; the parameters stay as they are."
    modules = [*lm.modules()] if is_gathered(lm) else []
    memory = gpu_memory(lm.device)
    on_cpu = lm.device.type == "cpu" and memory is None
    lora = [m for m in modules if mergeable(m) and (on_cpu or memory)]
    if memory and sum(m.weight.nbytes for m in lora) > MERGED_SHARE * memory: lora = []
    merged = {} if on_cpu else merged_weights(lora) # On a CPU one at a time, for they are packed
    if not on_cpu: lora = [*merged]
    inside_lora = {part for m in lora for part in m.modules()}
    linear = [m for m in modules if type(m) is nn.Linear and m not in inside_lora]
    packed = [m for m in linear if on_cpu and m.weight.dtype == torch.bfloat16]
    norms = {m for m in modules if type(m) is nn.LayerNorm and m.weight is not None}
    if not (memory and torch.is_autocast_enabled(lm.device.type)): norms = set() # There, autocast has them in float32
    layers = [m for m in [*lora, *packed, *norms] if "forward" not in vars(m)]
    mlps = {m.dense_h_to_4h: m for m in modules if type(m) is FusedBloomMLP}
    try:
        for m in layers:
            if m in norms:
                m.forward = float32_norm(m)
                continue
            if m in merged: weight = merged[m]
            else: weight = merged_weight(m) if type(m) is FusedLora else m.weight
            if m in mlps: mlps[m].up = packed_linear(weight, m.bias, rows, gelu=True)
            else: m.forward = packed_linear(weight, m.bias, rows)
        yield
    finally:
        for m in layers: vars(m).pop("forward", None)
        for m in mlps.values(): vars(m).pop("up", None)


BLOCK_OF_CACHE = 64 # Tokens


class GrowingLayer(DynamicLayer):
    "A layer of the key-value cache that is copied once per block, not once per token."
    def update(self,
               key_states: Tensor,   # (B, heads, tokens, size)
               value_states: Tensor, # Likewise
               *args, **kwargs,
    ) -> tuple[Tensor, Tensor]:      # With those of earlier tokens
        "Append keys and values, and return all."
        new = key_states, value_states
        if not self.is_initialized:
            self.lazy_initialization(*new)
            self.space = [x[:, :, :0] for x in new]
        used = self.get_seq_length()
        end = used + key_states.shape[2]
        more = -(-end // BLOCK_OF_CACHE) * BLOCK_OF_CACHE - self.space[0].shape[2]
        if more > 0: self.space = [F.pad(x, (0, 0, 0, more)) for x in self.space]
        for space, x in zip(self.space, new): space[:, :, used:end] = x
        return self.set_views(end)

    def set_views(self, end: int) -> tuple[Tensor, Tensor]: # Number of tokens
        "Keys and values so far."
        self.keys, self.values = (space[:, :, :end] for space in self.space)
        for x, space in zip((self.keys, self.values), self.space): x.whole = space # Contiguous, 0 at the end
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor):
        "Keep some rows."
        self.space = [space[beam_idx] for space in self.space]
        self.set_views(self.get_seq_length())


def grow_in_blocks(cache: Cache): # As a model has made it
    "Give keys and values space for later tokens, so that they are not copied for each; other kinds of layers stay."
    for i, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) is not DynamicLayer or not layer.is_initialized: continue
        cache.layers[i] = GrowingLayer()
        cache.layers[i].update(layer.keys, layer.values)


def drops_rows(cache: Cache) -> bool:
    "Do all of its layers keep only the rows that `reorder_cache` names? Layers that models define may hold more."
    parts = [cache, *getattr(cache, "layers", [])]
    return all(type(part).__module__ in (DynamicLayer.__module__, __name__) for part in parts)
