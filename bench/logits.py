"""How far are log-probs off when logits are rounded to half precision? logits.py OUT.json

Gemma's output layer, 640 by 262,144, scaled until logits reach about 65: there bfloat16 counts in halves."""
import torch
from found import Found, arguments
from models import on_device
from torch import Tensor

ROWS, HIDDEN, VOCAB = 64, 640, 262_144
LARGEST = 65.
TYPES = torch.float16, torch.bfloat16


def inputs(dtype: torch.dtype, vocab: int) -> tuple[Tensor, Tensor]: # (ROWS, HIDDEN) and (vocab, HIDDEN)
    "Hidden states and output layer in half precision; logits are normal but for their largest."
    torch.manual_seed(0)
    with on_device():
        hidden, head = torch.randn(ROWS, HIDDEN), torch.randn(vocab, HIDDEN)
    most = (hidden @ head.T).abs().max()
    return (hidden * (LARGEST / most)).to(dtype), head.to(dtype)


def rounded(hidden: Tensor, head: Tensor) -> Tensor:
    "Logits as a linear layer in half precision gives them."
    return torch.nn.functional.linear(hidden, head).float()


def kept(hidden: Tensor, head: Tensor) -> Tensor:
    "The same product with a float32 result."
    return torch.mm(hidden, head.T, out_dtype=torch.float32)


def exact(hidden: Tensor, head: Tensor) -> Tensor: # float64 results, in float32
    "The product of the same numbers in float64."
    parts = [(hidden.double() @ part.double().T).float() for part in head.split(2**15)]
    return torch.cat(parts, 1)


def compare(found: Found, dtype: torch.dtype, vocab: int):
    "Differences of log-probs of sampled tokens and of the most likely ones."
    hidden, head = inputs(dtype, vocab)
    right = exact(hidden, head).log_softmax(-1)
    ids = torch.cat([right.argmax(-1, keepdim=True), right.exp().multinomial(8)], 1) # (ROWS, 9)
    wanted = right.gather(1, ids)
    name = str(dtype).removeprefix("torch.")
    for way, product in {"rounded logits": rounded, "float32 logits (torch.mm, out_dtype)": kept}.items():
        with found.attempt(f"{name}, {way}", ours=product is rounded):
            logits = product(hidden, head)
            off = (logits.log_softmax(-1).gather(1, ids) - wanted).abs()
            found.row(**{
                "type": name, "logits": way, "largest logit": logits.abs().max().item(),
                "mean difference, nats": off.mean().item(), "largest": off.max().item(),
                "ratio off by, at most": off.max().expm1().item(),
                "other token is most likely": (logits.argmax(-1) != ids[:, 0]).float().mean().item(),
            })


def main(found: Found, args):
    "Both types."
    vocab = 4096 if args.quick else VOCAB
    for dtype in TYPES:
        with found.attempt(str(dtype)): compare(found, dtype, vocab)
    told = [f"{row['type']}, {row['logits'].split(' (')[0]}: {row['mean difference, nats']:.1e} mean, "
            f"{row['largest']:.1e} largest" for row in found.told["table"]]
    found.write(figures="nats off: " + "; ".join(told))
    found.note(f"{ROWS} positions, hidden size {HIDDEN}, {vocab} tokens; of each the most likely token and eight "
               "sampled ones; against the float64 product of the same half-precision numbers")


if __name__ == "__main__":
    args = arguments(__doc__).parse_args()
    found = Found(args)
    main(found, args)
    raise SystemExit(found.exit_status())
