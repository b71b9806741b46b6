"""The cross-entropy method over dreamed futures.

From the frame that is there, dream where many candidate action sequences lead; see which dreams end
near the goal; draw new candidates around those, and again (Rubinstein 1999). `cem` is the method,
Agent has the dreams and what they cost. Options are plan.py's Planner.
"""
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from configurator import UserError
from data import Clips, to_model
from machine import uncompiled, under_results
from vae import load_decoder

# -----------------------------------------------------------------------------
# how far a dream ends from the goal: the squared distance between the two, embedded by one of these

def pixels(frames, agent):
    """As they are: flat as long as an object and the place it should be at do not overlap."""
    return frames


def blur(frames, agent):
    """Blurred, so that objects feel each other from afar: a lot to find the way, a little to aim."""
    copies = []
    with no_autocast(frames):
        for share in (1 / 32, 3 / 32, 6 / 32):  # standard deviation, of the picture's side
            down, across = (gaussian(side, share, frames.device) for side in frames.shape[-2:])
            copies.append(down @ frames @ across.T)
    return torch.cat(copies, dim=1)


def whitened(frames, agent):
    """Blurred, with the colours mixed anew so that each varies as much as any other over the dataset:
    what is small but has a colour of its own then counts as much as what is large."""
    with no_autocast(frames):
        frames = torch.einsum('ij,njhw->nihw', agent.whitening, frames)
    return blur(frames, agent)


def no_autocast(frames):
    """bf16 has two or three digits: too few to tell a near miss from a hit."""
    return torch.autocast(frames.device.type, enabled=False)


def gaussian(side, share, device):
    """The matrix [side,side] that blurs a row of pixels, as if there were none beyond the border."""
    position = torch.arange(side, device=device, dtype=torch.float32) / side
    weight = torch.exp(-(position[:, None] - position).square() / (2 * share ** 2))
    return weight / weight.sum(dim=1, keepdim=True)


def whitening(frames):
    """The matrix [C,C] that mixes channels so that over frames [N,C,H,W] they are uncorrelated and of
    variance 1. What has less than a hundredth of the largest variance is mostly noise, and stays less.
    """
    with no_autocast(frames):
        variance, directions = torch.linalg.eigh(torch.cov(frames.transpose(0, 1).flatten(1)))
    variance = variance.clamp(min=0.01 * variance.max())
    return (directions / variance.sqrt()).T


def features(frames, agent):
    """What the model's middle block makes of each frame, shown as almost clean."""
    model = uncompiled(agent.model)  # which would not notice a new hook
    kept = []
    block = model.blocks[len(model.blocks) // 2]
    hook = block.register_forward_hook(lambda block, inputs, output: kept.append(output))
    model(frames[:, None], torch.full((1, 1), 20, device=frames.device))  # as noisy as a rollout's past
    hook.remove()
    return kept[0].float()


OBJECTIVES = {'pixels': pixels, 'blur': blur, 'whitened': whitened, 'features': features}


# -----------------------------------------------------------------------------
# the planner

def cem(cost, planner, low, high, generator, mean=None):
    """The cross-entropy method: actions [horizon,A] of low cost.

    cost: [N,horizon,A] -> [N]. low, high [A]: bounds of the actions. mean [horizon,A]: where to
    begin, instead of zero.
    """
    if mean is None:
        mean = torch.zeros(planner.horizon, len(low))
    std = torch.full_like(mean, planner.first_std)
    for _ in range(planner.iterations):
        noise = torch.randn(planner.candidates, *mean.shape, generator=generator)
        actions = mean + std * noise
        actions[0] = mean  # the plan so far stays a candidate
        actions = actions.clamp(low, high)
        best = cost(actions).topk(planner.elites, largest=False).indices
        mean = actions[best].mean(dim=0)
        std = actions[best].std(dim=0).clamp(min=planner.min_std)
    return mean


class Agent:
    """A world model that plans: all that stays the same from plan to plan. Raises UserError.

    The planner draws standardised actions [horizon, interval*A], the simulator takes them raw
    [horizon, interval, A], and the model is told them as in its training. A frame is uint8 [3,H,W].
    """

    def __init__(self, model, diffusion, config, planner, vae=None):
        if not model.config.action_dim:
            raise UserError('the model was trained without actions: there is nothing to plan')
        self.model, self.diffusion, self.planner = model, diffusion, planner
        self.device, self.interval = model.pos_embed.device, config['frame_interval']
        self.vae = vae or load_decoder(model.config.in_channels, device=self.device)
        self.size = model.config.input_size
        if self.vae:
            self.size = tuple(8 * side for side in self.size)
        dataset = under_results(config['dataset'])
        self.recorded = Clips(dataset, 'train', planner.horizon, self.interval, normalize=True)
        if self.recorded.action_dim != model.config.action_dim:
            raise UserError(f'{dataset}: {self.recorded.action_dim} action numbers do not fit the '
                            f'model, which takes {model.config.action_dim}')
        self.mean = torch.from_numpy(np.asarray(self.recorded.mean))
        self.std = torch.from_numpy(np.asarray(self.recorded.std))
        scale = self.recorded.action_scale(config['action_scale'])
        self.model_mean, self.model_std = (torch.from_numpy(np.asarray(part)) for part in scale)
        actions = self.recorded.actions
        self.low = self.standardised(actions.min(axis=0))
        self.high = self.standardised(actions.max(axis=0))

    @cached_property
    def whitening(self):
        """Of frames from all over the training split."""
        rows = np.linspace(0, len(self.recorded.frames) - 1, 256).astype(int)
        frames = to_model(torch.from_numpy(self.recorded.frames[rows]))
        return whitening(frames).to(self.device)

    def raw(self, actions):
        """Standardised [...,interval*A] -> raw [...,interval,A]."""
        return actions.unflatten(-1, (self.interval, -1)) * self.std + self.mean

    def standardised(self, action):
        """Raw [A] -> standardised [interval*A], the same all along the interval."""
        return ((torch.from_numpy(action) - self.mean) / self.std).repeat(self.interval)

    def encode(self, frames):
        """uint8 [N,3,H,W] -> frames [N,C,h,w] as the model dreams them."""
        if frames.dtype != np.uint8 or frames.shape[1:] != (3, *self.size):
            raise UserError(f'a frame or goal is {frames.dtype} {list(frames.shape[1:])}: '
                            f'expected uint8 {[3, *self.size]}')
        x = to_model(torch.from_numpy(frames), self.device)
        return self.vae.encode(x) if self.vae else x

    def dream_from(self, frame, generator):
        """A function: raw actions [N,horizon,interval,A] -> the frames [N,horizon,C,h,w] they lead to.

        Candidates share the frame they start from, which is run once for all of them, and the noise:
        they differ by actions only (and by what eta draws).
        """
        planner = self.planner
        context = self.encode(frame[None])[:, None]
        length = planner.horizon + 1
        draws = torch.randn(2, 1, length, *context.shape[2:], generator=generator)
        noise, context_noise = draws.to(self.device)

        def imagine(actions):
            scaled = (actions - self.model_mean) / self.model_std
            scaled = F.pad(scaled.flatten(-2), (0, 0, 0, 1))  # no frame follows the last
            frames = self.diffusion.sample(
                self.model, context, scaled.to(self.device), length, planner.num_steps,
                noise=noise.expand(len(scaled), -1, -1, -1, -1), context_noise=context_noise,
                **planner.sampler)
            return frames[:, 1:]

        return imagine

    def simulate_from(self, world):
        """The same function by the true simulator: the ceiling."""
        state = world.get_state()

        def imagine(actions):
            frames = []
            for candidate in actions.numpy():
                world.set_state(state)
                for acts in candidate:
                    for action in acts:
                        world.step(action)
                    frames.append(world.render(self.size[0]))
            world.set_state(state)
            return self.encode(np.stack(frames)).unflatten(0, (len(actions), -1))

        return imagine

    def cost_of(self, imagine, goal):
        """A function for cem: how far from the goal's frame standardised actions lead, [N]."""
        embed = OBJECTIVES[self.planner.objective]
        target = embed(self.encode(goal[None]), self)
        first = -1 if self.planner.look_at == 'last' else 0
        chunk = self.dreams_at_once()

        def cost(actions):
            costs = []
            for some in actions.split(chunk):
                frames = imagine(self.raw(some))[:, first:]
                errors = (embed(frames.flatten(0, 1), self) - target).square()
                costs.append(errors.reshape(len(some), -1).mean(dim=1).cpu())
            return torch.cat(costs)

        return cost

    def dreams_at_once(self):
        """How many fit into planner.memory: a patch keeps its keys and values in every other block,
        and is about 20 times as wide inside of one."""
        shape = self.model.config
        patches = shape.num_frames * shape.grid[0] * shape.grid[1]
        bytes_each = 4 * patches * shape.hidden_size * (shape.depth + 20)
        return max(1, int(self.planner.memory * 1e9 / bytes_each))
