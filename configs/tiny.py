"""KVPO on the toy world: the whole algorithm on a laptop's CPU, with the generator that ships.

    python -m kvpo_jax.main                                   # this file is the default

Expected outcome: see the measured table in README.md. Presets: `configs/tiny.py` is the paper's
algorithm, `configs/tiny.py:release` the released code's; every difference is a field below.

A field with "in X" names an alternative: X is the registry where they are implemented and
described, in kvpo_jax/algorithm/, kvpo_jax/models/ or kvpo_jax/backbone.py.
"""

from ml_collections import ConfigDict

PRESETS = ("paper", "release")


def get_config(preset: str = "paper") -> ConfigDict:
    """The toy configuration; `preset` is "paper" or "release"."""
    c = ConfigDict()
    c.seed = 0  # of every random draw: prompts, noise, pivots, routing, LoRA
    c.backbone = "toy"  # in backbone.BACKBONES

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
    m.dtype = "float32"  # in layers.DTYPES: activations and base weights; LoRA is always float32
    m.attention = "auto"  # in attention.IMPLEMENTATIONS
    m.remat = "none"  # in wan.REMAT: what is saved of a block for the backward pass
    # Base weights, whose file says the sizes above; empty is the toy generator that ships.
    c.weights = ""

    c.decoder = ConfigDict()
    # In wan_vae.DTYPES: weights and activations of Wan2.1's VAE.
    c.decoder.dtype = "bfloat16"

    # What generators of Wan2.1's design read (README, "Real checkpoints"); the toy needs nothing.
    c.paths = p = ConfigDict()
    p.lora = ""  # adapter that the policies start from; empty: a fresh one
    p.vae = ""
    p.hpsv3 = ""  # reward models, as config.reward.scorer names them
    p.videoalign = ""
    p.clip = ""
    p.dino = ""
    p.aesthetic = ""
    p.prompts = ""  # file of prompt sequences
    p.embeddings = ""  # of its sentences, made by kvpo-encode; empty: made on the fly
    p.umt5 = ""  # the text encoder that makes them
    p.tokenizer = ""  # the folder of its tokenizer

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
    s.solver = "euler"  # in flow.SOLVERS; Eq. 2
    s.context_step = 0.0  # level before the shift of the latent whose keys and values are cached

    c.window = w = ConfigDict()  # Eq. 3: sink, 9 local slots, the current block
    w.sink = 3
    w.past = 9  # local slots for past frames
    w.near = 3  # of these, the most recent frames, never routed; past - near slots are routed
    w.excluded = 3  # youngest past frames that are not routable
    # How far back a branch may be routed, sink included. A history holds what is read of it: the
    # sink, the last frames, and of the others those that are drawn.
    w.cache_frames = 36
    # In kv_cache.POSITIONS. "relative" counts them within the window, for videos of any length that
    # nobody trains on; "absolute" ends at 1024 latent frames.
    w.positions = "absolute"
    # Whether a routed context keeps the sink; if not, its slots are routed too (MemFlow's release).
    w.keep_sink = True
    # Draw only what would outlast the window in a ring that its blocks are written to (release).
    w.shared_ring = False
    w.recache_frames = 12  # frames whose keys and values are made anew at a prompt switch
    # Whether the sink outlives a prompt switch; if not, it is attended to as zeros (LongLive).
    w.global_sink = True
    w.bank = 0  # frames of MemFlow's narrative memory; 0 = none (LongLive)
    w.bank_interval = 3  # blocks between the frames that are recorded into it
    w.bank_reinsert = False  # the newest frame enters before every block, not once (release)

    c.rollout = r = ConfigDict()
    r.explore = "routing"  # in explore.EXPLORES: what makes the branches differ, in the W blocks
    r.branches = 8  # G
    r.branch_chunk = 0  # branches at a time, each chunk with the anchor again; 0 = all at once
    r.window_blocks = 3  # W
    r.perturbed_steps = 2  # solver steps with routed history: the first half
    r.perturb_write = False  # whether the cache-writing pass is routed too
    r.draw = "independent"  # in routing.DRAWS
    r.noise_mix = "preserving"  # in explore.MIXES: how noise of a branch's own enters the initial
    r.noise_scale = 0.3  # s of that mixture
    r.kernel = "cps"  # in flow.KERNELS: how a transition is drawn
    r.stochasticity = 1.0  # its strength: eta, or Flow-GRPO's a

    c.replay = ConfigDict()
    c.replay.states = "branch"  # in replay.STATES: which states are replayed, and against what
    c.replay.times = ()  # noise levels at which end points are replayed; empty: the solver's
    # Of the states of a block, how many are replayed, drawn for each prompt and iteration; 0 = all.
    c.replay.steps_drawn = 0
    c.replay.step_weight = "even"  # in replay.STEP_WEIGHTS: what the loss of a drawn step counts
    c.replay.context = "anchor"  # in replay.CONTEXTS: whose past the replay reads
    c.replay.text = "policy"  # in replay.TEXTS: whose text keys and values it reads
    c.replay.blocks = 0  # blocks replayed from the pivot on; never fewer than the perturbed window
    c.replay.energy = "velocity"  # in replay.ENERGIES; Eq. 5
    c.replay.sigma_floor = 1.0  # read by energy = "clean" only
    c.replay.grad_steps = 4  # the first so many solver steps carry gradient
    c.replay.chunk = 0  # states (branch, block, step) replayed at a time; 0 = all at once

    c.objective = o = ConfigDict()
    o.kind = "gibbs"  # in losses.KINDS: how velocities become a loss
    o.anchors = 4  # branches whose states are compared with all branches; kind = "neighbours"
    o.mix = 1.0  # b of the two policies around the old one; kind = "nft"
    o.adaptive = True  # whether each of their losses is over its error; kind = "nft"
    o.tau = 1.0  # temperature of the Gibbs policy, Eq. 6, in tau_unit
    o.tau_unit = "running_std"  # in objective.TAU_UNITS; stds of a group's energies, on average
    o.beta = 0.05  # KL weight, Eq. 16; its strength goes as beta / tau
    o.clip_low = 0.1  # Eq. 8
    o.clip_high = 0.2
    o.advantage = "group"  # in objective.ADVANTAGES; Eq. 9
    o.quasi_norm = 0.8  # p; read by advantage = "quasi_norm" only
    o.reward_tau = 0.1  # temperature of the rewards; read by advantage = "softmax" only
    o.advantage_clip = 0.0  # absolute bound on an advantage; 0 = none
    o.fusion_normalize = "none"  # in objective.NORMALIZERS; read by advantage = "anchor" only
    o.local_weight = 1.0
    o.global_weight = 0.5
    o.gate = "zero"  # in objective.GATES: what is left of a loss if no branch beats the anchor
    o.shuffle_advantages = False  # control: permute the advantages within each group
    o.negate_advantages = False  # control: push away from what the reward prefers

    c.reward = ConfigDict()
    c.reward.weights = ConfigDict({"VQ": 1 / 3, "MQ": 1 / 3, "TA": 1 / 3})
    # In scorers.SCORERS, module:function of your own, or a server's address; several with commas.
    c.reward.scorer = "toy"
    # Standard deviation of noise in the rewards that are trained on, as by a judge that errs.
    c.reward.noise = 0.0
    # Whether the scorers' weights stay on the devices; if not, they are loaded whenever one scores.
    c.reward.resident = True
    c.reward.segments = ()  # prompt segments that are scored, numbered from 0; empty = all
    c.reward.clip_frames = 0  # pixel frames scored per prompt segment, centred; 0 = all of them
    c.reward.clip_spacing = 160  # a longer segment has a clip for every so many frames; 0 = one
    c.reward.min_behind = 0.25  # share of the scored frames that lies behind a block that forks

    # How the servers are asked that reward.scorer and eval.scorer name (docs/rewards.md).
    c.reward.http = h = ConfigDict()
    h.timeout = 600.0  # seconds that an answer may take, with the clips before it in the queue
    h.retries = 8  # further tries of a request that got no answer
    h.backoff = 1.0  # seconds before the first of them; doubled before each further one, up to 60
    # Whether a run stops, to be continued, if a server does not answer; if not, each clip gets ...
    h.required = True
    h.missing = 0.0  # ... this score instead, with all others of its group
    h.format = "npz"  # In remote.FORMATS: the clips as they are, or as mp4, with losses
    h.megabytes = 256  # pixels of a request; it has whole groups, at least one
    h.requests = 1  # at a time to a server
    # Whether prompts are rolled out while a server scores those before them (train.micro_batch);
    # two rollouts are in memory then.
    h.ahead = True
    h.token_file = ""  # has the token of the servers; empty: KVPO_REWARD_TOKEN of the environment

    c.train = t = ConfigDict()
    t.iterations = 24
    # Ends a run before it would have spent more passes (kvpo_jax/budget.py); 0 = no limit.
    t.budget_passes = 0
    t.prompts_per_iteration = 4  # P
    # Of the world "return": the tasks whose stories are trained on; empty: its mix of them.
    t.tasks = ()
    t.held_out = 32  # sequences of the prompt file that are never trained on; the toy makes its own
    # Prompts at a time, their gradients summed; a divisor of P. 0 = the most that fit the devices,
    # which the run prints; all at once on a CPU.
    t.micro_batch = 0
    t.epochs = 1  # optimiser steps per rollout
    t.rollouts_per_sync = 1  # rollouts before the old policy is refreshed
    # The old policy keeps min(old_decay_step * iterations, old_decay) of itself when refreshed.
    t.old_decay_step = 0.0
    t.old_decay = 0.0
    t.learning_rate = 1e-3
    t.warmup = 0  # optimiser steps of linear warm-up
    t.weight_decay = 0.0
    t.grad_clip = 1.0  # global norm
    t.ema_decay = 0.9
    t.checkpoint_every = 10  # iterations
    t.keep = 2  # checkpoints kept, the newest
    # Kept besides: the best by the online policy's held-out reward. An evaluation then saves one.
    t.keep_best = 1
    t.video_every = 12  # iterations between videos of the branches; 0 = a run writes none

    c.eval = ConfigDict()
    c.eval.prompts = 32  # held-out prompt sequences; of a prompt file at most train.held_out
    c.eval.every = 12  # iterations between evaluations
    c.eval.batch = 0  # videos generated at once; 0 = as many as prompts in training, so that one
    # program serves both
    c.eval.by_block = True  # also the reward of every block alone, by the package's own scorers
    # As reward.scorer, and scorers.OF_VIDEOS; watched and never optimised, to see reward hacking.
    c.eval.scorer = "motion,stream"

    c.mesh = ConfigDict()
    c.mesh.data = 0  # devices over prompts; 0 = chosen from the device count
    c.mesh.fsdp = 1  # devices over prompts, besides those of mesh.data, that share the weights
    c.mesh.branch = 0  # devices over branches; 0 = chosen
    # Devices over the tokens of a block, and over the rows of frames that are decoded; divides
    # model.num_heads and the tokens of a frame.
    c.mesh.context = 1

    if preset == "release":
        s.update(solver="renoise", shift=5.0, context_step=0.001)
        w.update(past=6, near=1, excluded=4, cache_frames=33, shared_ring=True)
        r.update(perturbed_steps=4, perturb_write=True, draw="dispersed")
        c.replay.update(
            context="self_rolled", text="rollout", blocks=4, energy="clean", grad_steps=2
        )
        o.update(tau=1.0, tau_unit="absolute", beta=10.0, advantage="anchor", advantage_clip=2.5)
        o.update(fusion_normalize="std", gate="mechanism_2")
        t.update(rollouts_per_sync=2, weight_decay=0.01, warmup=5, ema_decay=0.999)
    return c
