"""The forecast of a plan written down once more, plainly, without the planner's code, as its check."""

from memo_runtime.records import Action, Executor, Role

RESIDENT = (Role.PARAMETER, Role.SHARED)


def groups_of(profile, plan, index):
    block, planned = profile.blocks[index], plan[index]
    return [
        (group, action, group.size.at(planned.tokens))
        for group, action in zip(block.groups, planned.actions, strict=True)
        if group.role not in RESIDENT
    ]


def copied(profile, plan, index):
    planned = plan[index]
    sizes = []
    for group, action, size in groups_of(profile, plan, index):
        if action is Action.HOST:
            sizes.append(size)
        elif action is Action.PREFIX:
            sizes.append(round(group.size.linear * (planned.prefix - planned.device_rows)))
        elif action is Action.TAIL:
            sizes.append(round(group.size.linear * (planned.tokens - planned.prefix)))
    return sizes


def kept(profile, plan, index):
    total = 0
    for group, action, size in groups_of(profile, plan, index):
        if action is Action.KEEP and group.saved:
            total += size
    return total + cloned(profile, plan, index)


def cloned(profile, plan, index):
    """Rows that stay are copied out of the tensor that they are part of; all else that stays is what was saved."""
    rows = plan[index].device_rows
    return sum(
        round(group.size.linear * rows)
        for group, action, _ in groups_of(profile, plan, index)
        if action is Action.PREFIX
    )


def full(profile, plan, index):
    total = 0
    for group, action, size in groups_of(profile, plan, index):
        if action in (Action.HOST, Action.PREFIX) or (action is Action.REBUILD and group.saved):
            total += size
        elif action is Action.TAIL:
            total += round(group.size.linear * (plan[index].tokens - plan[index].prefix))
    return total


def landing(profile, plan, index):
    total = 0
    for group, action, size in groups_of(profile, plan, index):
        if action in (Action.HOST, Action.PREFIX):
            total += size
        elif action is Action.TAIL:
            total += round(group.size.linear * (plan[index].tokens - plan[index].prefix))
    return total


def outgoing(profile, plan, index):
    moved = 0
    for _, action, size in groups_of(profile, plan, index):
        in_part = action is Action.PREFIX and plan[index].prefix > plan[index].device_rows
        if in_part or action in (Action.HOST, Action.TAIL):
            moved += size
    return moved


def has_copies(profile, plan, index):
    return any(action in (Action.HOST, Action.PREFIX, Action.TAIL) for _, action, _ in groups_of(profile, plan, index))


def host_bytes(profile, plan):
    return sum(-(-size // 64) * 64 for index in range(len(plan)) for size in copied(profile, plan, index))


def spent(profile, plan, index):
    """What only a rerun reads, which is there for it alone."""
    total = 0
    for group, action, size in groups_of(profile, plan, index):
        if not group.saved and action is Action.HOST:
            total += size
        elif not group.saved and action is Action.TAIL:
            total += round(group.size.linear * (plan[index].tokens - plan[index].prefix))
    return total


def input_beside(profile, plan, index):
    """The block's input, where autograd does not save it: the caller holds it while the block runs."""
    groups = groups_of(profile, plan, index)
    return sum(size for group, _, size in groups if group.role is Role.INPUT and not group.saved)


def entry(profile, plan):
    """The first block's input, where that keeps it: it was on the device before, and counts once."""
    if not plan:
        return 0
    kinds = [(group, action) for group, action in zip(profile.blocks[0].groups, plan[0].actions, strict=True)]
    tokens = min(plan[0].tokens, profile.blocks[0].tokens)
    return sum(
        group.size.at(tokens) for group, action in kinds
        if group.role is Role.INPUT and group.saved and action is Action.KEEP
    )  # fmt: skip


def rerun(profile, plan, index):
    """Transient bytes of a rerun, beside its buffers; None: there is none."""
    block, planned = profile.blocks[index], plan[index]
    waiting = block.output.at(planned.tokens)
    if planned.executor is Executor.RECOMPUTE or (planned.executor is Executor.REPLAY and planned.prefix == 0):
        return waiting + block.forward_peak.at(planned.tokens)
    if planned.executor is Executor.REPLAY and planned.prefix < planned.tokens:
        growing = block.rerun_peak.exact(planned.tokens) - block.rerun_peak.constant
        return waiting + round(block.rerun_peak.constant + growing / planned.tokens * (planned.tokens - planned.prefix))
    return None


def allowed(profile, tokens):
    """1 MiB for each large tensor of the block that has most, and 8 rows of the widest that splits."""
    large, rows = [], [0]
    for block in profile.blocks:
        moved = [group for group in block.groups if group.role not in (Role.PARAMETER, Role.SHARED)]
        large.append(sum(group.size.at(max(tokens, block.tokens)) > 2**20 for group in moved))
        rows += [8 * round(group.size.linear) for group in moved if group.splits]
    return (0 if profile.expandable else 2**20 * max(large, default=0)) + max(rows) + 1024


def peaks(profile, plan, accumulating=False):
    """(stash peak, device peak) by the definition of every point of the step."""
    cuda = profile.device_type != "cpu"
    walked = cuda and not accumulating
    gradients = [block.gradients for block in profile.blocks]
    outside = max(0, profile.states.gradients - sum(gradients))
    count = len(plan)
    stash, device = [], []
    for i in range(count):
        skeletal = sum(size for group, _, size in groups_of(profile, plan, i) if group.saved)
        held = sum(kept(profile, plan, j) for j in range(i)) + skeletal
        if cuda and i:
            held += outgoing(profile, plan, i - 1)
        stash.append(held)
        beside = input_beside(profile, plan, i)
        device.append(held + (profile.blocks[i].forward_peak.at(plan[i].tokens) + beside if cuda else 0))
        if plan[i].executor in (Executor.REPLAY, Executor.RECOMPUTE):
            # Its stash is made while the tensors that it is made from are still there.
            stash.append(held + cloned(profile, plan, i))
            result = profile.blocks[i].output.at(plan[i].tokens)
            device.append(held + cloned(profile, plan, i) + (result + beside if cuda else 0))
    everything = sum(kept(profile, plan, j) for j in range(count))
    tokens = plan[-1].tokens if count else 0
    stash.append(everything)
    head = outside if walked else 0
    # A loss may make the head's gradient in the forward.
    device.append(everything + head + (profile.end(tokens)[1] if cuda else 0))
    going_back = len(device)
    returned = profile.result.at(tokens) if cuda else 0
    device.append(everything + head + (profile.end(tokens)[0] if cuda else 0))
    for i in reversed(range(count)):
        held = sum(kept(profile, plan, j) for j in range(i + 1)) + full(profile, plan, i)
        lower = [j for j in range(i) if has_copies(profile, plan, j)]
        if lower:
            comes = landing(profile, plan, lower[-1])
            # What is little beside what the block frees comes when that is free.
            waits = 4 * comes <= full(profile, plan, i) - spent(profile, plan, i)
            held += 0 if waits else comes
        above = outside + sum(gradients[i + 1 :]) if walked else 0
        stash.append(held)
        again = rerun(profile, plan, i)
        if again is not None:
            device.append(held + above + (again + returned if cuda else 0))
        held -= spent(profile, plan, i)
        # A block is timed with its result there.
        beside = max(0, returned - profile.blocks[i].output.at(plan[i].tokens))
        device.append(held + above + (profile.blocks[i].backward_peak.at(plan[i].tokens) + beside if cuda else 0))
    gone = profile.entry.at(tokens) if cuda else 0
    forward, backward = device[:going_back], device[going_back:]
    if cuda:
        # What the first block is given is around the blocks; where it goes with the forward, only the block has it.
        device = [held - entry(profile, plan) for held in forward]
        device += [held - (gone or entry(profile, plan)) for held in backward]
    device.append(-gone)
    device[-1] += (outside + sum(gradients) if walked else 0) + (profile.states.stepping + returned if cuda else 0)
    states = profile.states
    if cuda:
        base = profile.allocated_bytes - states.gradients_present
        if accumulating:
            base += max(states.gradients, states.gradients_present)
        base += states.optimizer - states.optimizer_present
        base += profile.shared.at(tokens) + profile.outside_forward.at(tokens) + allowed(profile, tokens)
    else:
        base = states.parameters + states.buffers + states.gradients + states.optimizer
    return max(stash), base + max(device)
