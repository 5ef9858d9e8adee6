"""KVPO on the toy world: the whole algorithm on a laptop's CPU, with the pretrained generator of the package.

    python -m kvpo_jax.main                                   # this file is the default

Expected outcome: see the measured table in README.md. Presets: `configs/tiny.py` is the paper's algorithm,
`configs/tiny.py:release` the released code's (DESIGN: every difference is a field below).
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "release")


def get_config(preset: str = "paper") -> ConfigDict:
    """The toy configuration; `preset` is "paper" or "release"."""
    if preset not in PRESETS:
        raise ValueError(f"configs/tiny.py has the presets {', '.join(PRESETS)}, not {preset!r}")
    c = ConfigDict()
    c.seed = 0  # of every random draw: prompts, noise, pivots, routing, LoRA
    c.backbone = "toy"  # toy | longlive | memflow

    c.model = m = ConfigDict()  # the causal Wan DiT; here a small one
    m.dim = 96
    m.ffn_dim = 384
    m.num_heads = 4
    m.num_layers = 3
    m.freq_dim = 64  # width of the sinusoid of the noise level
    m.text_dim = 16  # width of a text token; the toy's is its vocabulary
    m.text_len = 8  # tokens a prompt is padded to; padding is attended to, as in Wan
    m.channels = 12  # latent channels
    m.patch = (1, 2, 2)
    m.eps = 1e-6
    m.sparse_memory = 0  # of sink and bank frames, how many a head attends to (MemFlow); 0 = all
    m.dtype = "float32"  # activations and base weights; LoRA masters are always float32
    m.attention = "auto"  # cudnn: its flash attention in bfloat16 | xla | auto: cudnn on NVIDIA GPUs, else xla
    m.remat = "none"  # what the backward pass recomputes: none | products: all but products | block: blocks
    c.weights = ""  # base weights; empty is the toy generator that ships with the package

    c.paths = p = ConfigDict()  # what LongLive and MemFlow read (README, "Real checkpoints"); the toy needs none of it
    p.lora = ""  # adapter that the policies start from; empty: a fresh one
    p.vae = ""
    p.hpsv3 = ""  # reward models, as config.reward.scorer names them
    p.videoalign = ""
    p.prompts = ""  # file of prompt sequences
    p.embeddings = ""  # of its sentences, from tools/encode_prompts.py; empty: made on the fly with
    p.umt5 = ""  # the text encoder
    p.tokenizer = ""  # and its tokenizer's folder

    c.lora = ConfigDict()
    c.lora.rank = 8
    c.lora.alpha = 8.0  # the update of a Linear is alpha / rank * B A

    c.video = v = ConfigDict()
    v.height = 4  # latent
    v.width = 4
    v.blocks = 12  # B
    v.block_frames = 3  # F
    v.switch_frames = (12, 24)  # latent frames at which the next prompt segment begins

    c.sampler = s = ConfigDict()
    s.steps = (1.0, 0.75, 0.5, 0.25)  # noise levels before the shift
    s.shift = 1.0
    s.solver = "euler"  # euler: Eq. 2 | renoise: the distilled backbones' few-step sampler
    s.context_step = 0.0  # as steps: level of the latent whose keys and values are cached; the network is told 0

    c.window = w = ConfigDict()  # Eq. 3-4: sink, 9 local slots, the current block
    w.sink = 3
    w.past = 9  # local slots for past frames
    w.near = 3  # of these, the most recent frames, never routed; past - near slots are routed
    w.excluded = 3  # youngest past frames that are not routable
    w.cache_frames = 36  # ring capacity of the history, sink included
    w.keep_sink = True  # whether a routed context keeps the sink; if not, its slots are routed too (MemFlow's release)
    w.shared_ring = False  # draw only what would outlast the window in a ring that its blocks are written to (release)
    w.recache_frames = 12  # frames whose keys and values are made anew at a prompt switch
    w.global_sink = True  # the sink outlives a prompt switch; if not, it is attended to as zeros afterwards (LongLive)
    w.bank = 0  # frames of MemFlow's narrative memory; 0 = none (LongLive)
    w.bank_interval = 3  # blocks between the frames that are recorded into it
    w.bank_reinsert = False  # the newest frame enters before every block, not once (release)

    c.rollout = r = ConfigDict()
    r.branches = 8  # G
    r.branch_chunk = 0  # branches at a time, each chunk with the anchor again; a divisor of G, 0 = all at once
    r.window_blocks = 3  # W
    r.perturbed_steps = 2  # solver steps with routed history: the first half
    r.perturb_write = False  # whether the cache-writing pass is routed too
    r.draw = "independent"  # per branch (paper) | "dispersed": shifts of one permutation (release)

    c.replay = ConfigDict()
    c.replay.context = "anchor"  # the anchor's unperturbed cache | self_rolled: each branch's own (release)
    c.replay.text = "policy"  # whose text keys and values: policy: the replaying one's | rollout: as cached (release)
    c.replay.blocks = 0  # blocks replayed from the pivot on; never fewer than the perturbed window
    c.replay.energy = "velocity"  # Eq. 5 | clean: clean-latent error / (2 max(sigma, sigma_floor)^2) (release)
    c.replay.sigma_floor = 1.0  # read by energy = "clean" only
    c.replay.grad_steps = 4  # the first so many solver steps carry gradient
    c.replay.chunk = 0  # rows (branch, block, step) replayed at a time, forward and backward; 0 = all at once

    c.objective = o = ConfigDict()
    o.tau = 1.0  # temperature of the Gibbs policy, Eq. 6, in tau_unit
    o.tau_unit = "group_std"  # group_std: of the old energies of the group | absolute
    o.beta = 0.05  # KL weight, Eq. 16; its strength goes as beta / tau
    o.clip_low = 0.1  # Eq. 8
    o.clip_high = 0.2
    o.advantage = "group"  # group: Eq. 9 | anchor: (r - r_anchor) / std, per component and fused (release)
    o.advantage_clip = 0.0  # absolute bound on an advantage; 0 = none
    o.fusion_normalize = "none"  # of local and global advantages: none | std | zscore (advantage = "anchor" only)
    o.local_weight = 1.0
    o.global_weight = 0.5
    o.gate = "zero"  # no branch above the anchor: zero (paper) | mechanism_1 | mechanism_2 (release)
    o.shuffle_advantages = False  # control: permute the advantages within each group
    o.negate_advantages = False  # control: push away from what the reward prefers

    c.reward = ConfigDict()
    c.reward.weights = ConfigDict({"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3})
    c.reward.scorer = "toy"  # toy | hpsv3 | videoalign | motion | module:function of your own; several with commas
    c.reward.resident = True  # the scorers' weights stay on the devices; if not, they are loaded whenever one scores
    c.reward.clip_frames = 0  # pixel frames scored per prompt segment, centred; 0 = the whole segment

    c.train = t = ConfigDict()
    t.iterations = 40
    t.prompts_per_iteration = 4  # P
    t.held_out = 32  # sequences of the prompt file that are never trained on; the toy makes its own
    t.micro_batch = 0  # prompts at a time, their gradients summed; a divisor of P, 0 = all at once
    t.epochs = 1  # optimiser steps per rollout
    t.rollouts_per_sync = 1  # rollouts before the old policy is refreshed
    t.learning_rate = 1e-3
    t.warmup = 0  # iterations of linear warm-up
    t.weight_decay = 0.0
    t.grad_clip = 1.0  # global norm
    t.ema_decay = 0.9
    t.checkpoint_every = 10  # iterations
    t.keep = 2  # checkpoints kept
    t.video_every = 20  # iterations between pictures of the branches

    c.eval = ConfigDict()
    c.eval.prompts = 32  # held-out prompt sequences, the first so many; train.held_out of a prompt file at most
    c.eval.every = 20  # iterations between evaluations
    c.eval.batch = 16  # videos generated at once; 0 = as many as there are prompts at a time in training
    c.eval.scorer = "motion"  # as reward.scorer; only watched, never optimised: does the reward get hacked?

    c.mesh = ConfigDict()
    c.mesh.data = 0  # devices over prompts; 0 = chosen from the device count
    c.mesh.branch = 0  # devices over branches; 0 = chosen

    if preset == "release":
        s.update(solver="renoise", shift=5.0, context_step=0.001)
        w.update(past=6, near=1, excluded=4, cache_frames=33, shared_ring=True)
        r.update(perturbed_steps=4, perturb_write=True, draw="dispersed")
        c.replay.update(context="self_rolled", text="rollout", blocks=4, energy="clean", grad_steps=2)
        o.update(tau=1.0, tau_unit="absolute", beta=10.0, advantage="anchor", advantage_clip=2.5)
        o.update(fusion_normalize="std", gate="mechanism_2")
        t.update(rollouts_per_sync=2, weight_decay=0.01, warmup=5, ema_decay=0.999)
    return c
