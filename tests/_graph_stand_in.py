"""What computes where a CUDA graph would be replayed, on any device."""

import torch


class GraphStandIn:
    """Takes the place of ``visionmamba.cuda_graph._capture``; ``replays`` counts forward passes.

    As the graphs do, it warms up, writes outputs and gradients to the same memory each time, and uses the gradients'
    memory for other things in the forward pass.
    """

    def __init__(self):
        self.replays = 0

    def __call__(self, function, inputs):
        example, *aliases = inputs
        for _ in range(3):
            output = function(example, *aliases)
            found = torch.autograd.grad(output.sum(), [a for a in aliases if a.requires_grad], allow_unused=True)
        found, output = iter(found), output.detach().clone()
        gradients = [next(found) if alias.requires_grad else None for alias in aliases]
        gradients = [None if gradient is None else gradient.clone() for gradient in gradients]
        place = example.clone().requires_grad_()  # unlike the example, that the model computes and does not come here

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, *weights):
                self.replays += 1
                assert all(w.data_ptr() == a.data_ptr() for w, a in zip(weights, aliases, strict=True))
                for gradient in gradients:
                    if gradient is not None:
                        gradient.fill_(torch.nan)
                place.copy_(x)
                with torch.enable_grad():
                    ctx.output = function(place)
                ctx.weights = weights
                output.copy_(ctx.output.detach())
                return output.detach()

            @staticmethod
            def backward(ctx, dy):
                wanted = [weight for weight in ctx.weights if weight.requires_grad]
                found = iter(torch.autograd.grad(ctx.output, wanted, dy, allow_unused=True))
                for weight, gradient in zip(ctx.weights, gradients, strict=True):
                    new = next(found) if weight.requires_grad else None
                    if gradient is not None:
                        gradient.copy_(new)
                return None, *(None if gradient is None else gradient.detach() for gradient in gradients)

        return Replay.apply
