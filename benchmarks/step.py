"""A training step on a CPU: ours against a plain loop over exemplars in fp32.

    python benchmarks/step.py [--model cim_resnet50] [--batch 4] [--compile]

Both make the same step from the same weights (their losses are compared before timing): context S = 160, K = 6
exemplars of T = 64, target and online encoder, backward, AdamW, moving average. The plain one encodes the exemplars one
after the other and projects the context again for each of them, as a straightforward reading of the paper does. Ours
runs as `cim_models.pretrain` does by default: bf16 where the hardware multiplies it natively, fp32 elsewhere; a ResNet
with its channels last. The rows alternate, so that a busy machine slows all; the table gives medians and the median of
each round's ratio.
"""

import copy
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from table import Table, parser, ratio, take_turns
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn

from cim_models.backbones import ARCHITECTURES, VisionTransformer, build
from cim_models.precision import fast_bf16
from cim_models.pretext.model import CIM

CONTEXT, EXEMPLAR, COUNT, MOMENTUM = 160, 64, 6, 0.99
PLAIN, BAR = "plain loop, fp32", 2
"""The row that is compared with, and how many times faster ours shall be."""


class Plain(nn.Module):
    """The method written down plainly, from torch's and timm's own modules, with a copy of the weights of a `CIM`."""

    def __init__(self, cim: CIM) -> None:
        super().__init__()
        self.online, self.target, head = copy.deepcopy(cim.online), copy.deepcopy(cim.target), copy.deepcopy(cim.head)
        self.embed, self.norm1, self.norm2, self.mlp, self.norm = (
            head.embed,
            head.norm1,
            head.norm2,
            head.mlp,
            head.norm,
        )
        width = self.embed.out_features
        self.attention = nn.MultiheadAttention(width, head.attn.num_heads, batch_first=True)
        self.attention.in_proj_weight.data = torch.cat([head.attn.q.weight, head.attn.kv.weight]).detach()
        self.attention.in_proj_bias.data = torch.cat([head.attn.q.bias, head.attn.kv.bias]).detach()
        self.attention.out_proj = head.attn.proj
        self.predict = nn.Conv2d(width, 1, 1)
        self.predict.weight.data = head.predict.weight.detach()[:, :, None, None]
        self.predict.bias.data = head.predict.bias.detach()
        self.prefix = 1 if isinstance(cim.online, VisionTransformer) else 0
        self.side = CONTEXT // (16 if self.prefix else 32)
        positions = F.pad(head._pos_embed((self.side, self.side), self.embed.weight), (0, 0, self.prefix, 0))
        self.register_buffer("head_positions", positions)
        self.register_buffer("context_positions", cim.pos_embed(torch.empty(1, 3, CONTEXT, CONTEXT)))
        self.register_buffer("exemplar_positions", cim.pos_embed(torch.empty(1, 3, EXEMPLAR, EXEMPLAR)))

    def encode(self, encoder: nn.Module, images: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return encoder.forward_features(images).flatten(2).transpose(1, 2)
        x = encoder.patch_embed(images).flatten(1, 2)
        x = torch.cat([encoder.cls_token.expand(len(x), -1, -1), x], dim=1)
        return encoder.norm(encoder.blocks(x + positions))

    def forward(self, context: Tensor, exemplars: Tensor, maps: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = self.encode(self.target, context, self.context_positions)
        losses = []
        for exemplar, inside in zip(exemplars.unbind(1), maps.unbind(1), strict=True):
            shown = self.norm1(self.embed(self.encode(self.online, exemplar, self.exemplar_positions)))
            x = self.embed(tokens) + self.head_positions
            x = x + self.attention(self.norm1(x), shown, shown, need_weights=False)[0]
            x = x + self.mlp(self.norm2(x))
            x = self.norm(x)[:, self.prefix :].transpose(1, 2).unflatten(2, (self.side, self.side))
            logits = F.interpolate(self.predict(x), (CONTEXT, CONTEXT), mode="bilinear", align_corners=True)
            losses.append(F.binary_cross_entropy_with_logits(logits[:, 0], inside.float()))
        return torch.stack(losses).mean()

    @torch.no_grad()
    def update_target(self, momentum: float) -> None:
        for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
            target.copy_(momentum * target + (1 - momentum) * online)


def training_step(
    model: CIM | Plain, inputs: tuple[Tensor, Tensor, Tensor], bf16: bool = False, forward: Callable | None = None
) -> Callable[[], None]:
    """A function that makes one step: forward, backward, AdamW (ours is fused, as in a run), moving average."""
    groups = param_groups_weight_decay(model, 0.05)
    optimiser = torch.optim.AdamW(groups, lr=1e-6, betas=(0.9, 0.95), fused=isinstance(model, CIM) or None)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = (model if forward is None else forward)(*inputs)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        model.update_target(MOMENTUM)

    return step


def main() -> None:
    """Prints the table."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default="cim_vit_small", choices=ARCHITECTURES)
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--compile", action="store_true", help="one more row: ours under torch.compile")
    options = arguments.parse_args()

    torch.manual_seed(0)
    cim = CIM(build(options.model))
    nn.init.normal_(cim.head.predict.weight, std=0.02)  # a head that predicts nothing passes no gradient
    plain = Plain(cim)
    inputs = (
        torch.randn(options.batch, 3, CONTEXT, CONTEXT),
        torch.randn(options.batch, COUNT, 3, EXEMPLAR, EXEMPLAR),
        torch.rand(options.batch, COUNT, CONTEXT, CONTEXT) < 0.25,
    )
    with torch.no_grad():  # in evaluation mode, since statistics of a BatchNorm are those of one exemplar or of all
        torch.testing.assert_close(plain.eval()(*inputs), cim.eval()(*inputs).loss, atol=1e-5, rtol=1e-5)
    plain.train()
    cim.train()
    if not plain.prefix:
        cim = cim.to(memory_format=torch.channels_last)

    bf16 = fast_bf16() and not torch.cuda.is_available()
    ours = f"ours, {'bf16' if bf16 else 'fp32'} by default"
    rows = {PLAIN: training_step(plain, inputs), ours: training_step(cim, inputs, bf16)}
    if bf16:
        rows["ours, fp32"] = training_step(cim, inputs)
    if not plain.prefix:
        rows[f"{ours}, channels first"] = training_step(channels_first(cim), inputs, bf16)
    if options.compile:
        rows["ours, compiled"] = training_step(cim, inputs, bf16, torch.compile(cim))
    seconds = take_turns(rows, options.rounds, warm=2)

    sizes = f"batch {options.batch}, S {CONTEXT}, T {EXEMPLAR}, K {COUNT}, {options.rounds} rounds"
    columns = {"ms/step": ".0f", "images/s": ".2f", "speed-up": ".2f", "bar": ".0f"}
    table = Table(f"Training step of {options.model} on a CPU", columns, [sizes])
    for name, took in seconds.items():
        median, bar = statistics.median(took), BAR if name == ours else None
        table.rows[name] = [1000 * median, options.batch / median, ratio(seconds[PLAIN], took), bar]
    table.finish(options.out)


def channels_first(cim: CIM) -> CIM:
    """A copy in torch's own memory format."""
    return copy.deepcopy(cim).to(memory_format=torch.contiguous_format)


if __name__ == "__main__":
    main()
