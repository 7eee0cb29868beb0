"""Advantage estimators beside PRIME's own, which is rloo() in prime.py, and what they all share.

Each is a function (rewards [N, T], mask [N, T], n_samples, gamma) -> returns [N, T]; the K rows of
a prompt stand next to each other, and mask says where this source of rewards pays. Raises
ValueError for n_samples < 2, for N not a multiple of it, for a row with an empty mask.
"""

import torch


def suffix_sum(x, gamma: float = 1.0):
    """R_t = sum over k >= t of gamma^(k-t) x_k, along the last dimension."""
    if gamma == 1.0:
        backwards = x.flip(-1)
        return backwards.cumsum(-1).flip(-1)

    out = torch.empty_like(x)
    running = torch.zeros_like(x[..., 0])
    for t in reversed(range(x.shape[-1])):
        running = x[..., t] + gamma * running
        out[..., t] = running
    return out


def check_groups(rewards, mask, n_samples: int):
    """The mask as bool. Raises ValueError if rows, samples and mask make no groups."""
    if n_samples < 2:
        raise ValueError("an advantage needs at least 2 samples per prompt")
    if len(rewards) % n_samples:
        raise ValueError(f"{len(rewards)} rows are not a multiple of {n_samples} samples")
    mask = mask.bool()
    if not mask.any(-1).all():
        raise ValueError("a row has no valid token")
    return mask


def group_statistics(rewards, mask, n_samples: int):
    """Mean and standard deviation [N, 1] of the rewards of all K rows of a row's group."""
    paid = mask.view(-1, n_samples * mask.shape[1])  # [prompts, K T]
    rewards = rewards.reshape(paid.shape)
    values = torch.where(paid, rewards, 0.0)
    count = paid.sum(-1, keepdim=True)
    total = values.sum(-1, keepdim=True)
    mean = total / count

    squares = (values - mean) ** 2
    squares = torch.where(paid, squares, 0.0)
    freedom = (count - 1).clamp(min=1)
    variance = squares.sum(-1, keepdim=True) / freedom
    std = variance.sqrt()

    # The same for each of a prompt's rows.
    mean_of_row = mean.repeat_interleave(n_samples, 0)
    std_of_row = std.repeat_interleave(n_samples, 0)
    return mean_of_row, std_of_row


def grpo(rewards, mask, n_samples: int, gamma: float = 1.0):
    """GRPO's returns [N, T]: rewards minus their group's mean, divided by its standard deviation.

    Shao et al., DeepSeekMath, arXiv 2402.03300, sections 4.1.2 (outcome) and 4.1.3 (process).
    Outcomes 1 0 0 1 become 0.87 -0.87 -0.87 0.87.
    """
    mask = check_groups(rewards, mask, n_samples)
    mean, std = group_statistics(rewards, mask, n_samples)
    centred = rewards - mean
    scaled = centred / (std + 1e-6)
    scaled = torch.where(mask, scaled, 0.0)
    return suffix_sum(scaled, gamma)


def dr_grpo(rewards, mask, n_samples: int, gamma: float = 1.0):
    """Dr. GRPO's returns [N, T]: rewards minus their group's mean, not divided by anything.

    Liu et al., Understanding R1-Zero-Like Training, arXiv 2503.20783. Its other half, a sum over
    tokens in place of the mean over a row's tokens, would be a change of ppo_loss().
    Outcomes 1 0 0 1 become 1/2 -1/2 -1/2 1/2.
    """
    mask = check_groups(rewards, mask, n_samples)
    mean, _ = group_statistics(rewards, mask, n_samples)
    centred = rewards - mean
    centred = torch.where(mask, centred, 0.0)
    return suffix_sum(centred, gamma)


def reinforce(rewards, mask, n_samples: int, gamma: float = 1.0):
    """REINFORCE's returns [N, T] with the mean reward of the whole batch as the baseline."""
    mask = check_groups(rewards, mask, n_samples)
    mean = rewards[mask].mean()
    centred = rewards - mean
    centred = torch.where(mask, centred, 0.0)
    return suffix_sum(centred, gamma)
