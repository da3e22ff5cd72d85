"""Typed recipe: what a user may set, with defaults.

A recipe YAML under ``recipes/`` is composed with hydra and merged into :class:`RunConfig`; :mod:`dynaconv.rules` says
what each field may be. Importing this file imports neither torch nor hydra.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class DataConfig:
    """Text for calibration, training and validation.

    Attributes:
        train: A file, glob or folder of text, a ``.jsonl`` file, the name of a Hugging Face dataset, or
            ``python-stdlib`` (the standard library's own source on this machine). A list pools several.
        weights: Share of the training windows that each item of ``train`` gives, relative to each other: ``[7, 3]``.
            An item with less text than its share asks for begins again. ``None`` makes one pool of all.
        validation: Text that is never trained on, named like ``train``. ``None`` holds documents of ``train`` out.
        validation_share: Share of documents held out, by hash of their content, when ``validation`` is ``None``.
        exclude: Glob patterns; matching files are left out of ``train`` and ``validation``.
        field: Text field of jsonl records, parquet rows and datasets.
        chat: Field of jsonl records, parquet rows and datasets that holds a conversation, usually ``messages``: a list
            of ``{role, content}``. It is read instead of ``field`` and goes through the tokenizer's chat template;
            only the assistant's answers are predicted. Text files stay text. ``None``: there are no conversations.
        dataset_config: Configuration name of a Hugging Face dataset.
        dataset_split: Split of a Hugging Face dataset that ``train`` is read from.
        sequence_length: Tokens in a window.
        pack: Cut one stream of documents into full windows. ``False`` keeps one document a window, padded.
    """

    train: list[str] = field(default_factory=lambda: ["python-stdlib"])
    weights: list[float] | None = None
    validation: list[str] | None = None
    validation_share: float = 0.05
    exclude: list[str] = field(default_factory=list)
    field: str = "text"
    chat: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    sequence_length: int = 256
    pack: bool = True


@dataclass
class ProfileConfig:
    """How much text is run through the parent, and what is gathered for a training-free router.

    Attributes:
        tokens: Calibration tokens.
        batch_size: Windows in a batch.
        curve_share: Share of the calibration tokens on which difficulty curves are measured.
        order: Which neurons of nested experts come first: ``importance`` (mean |activation| times the norm of the down
            column) or ``none`` (as they are). Those of routed experts are clustered.
        loss_aware: Weigh curves, or what blocks add, by the gradient of the loss (needs the whole model and a backward
            pass in memory).
    """

    tokens: int = 32768
    batch_size: int = 16
    curve_share: float = 0.25
    order: str = "importance"
    loss_aware: bool = False


@dataclass
class ImportanceConfig:
    """How much text is run through the source to find what may be left out of it.

    Attributes:
        tokens: Calibration tokens.
        batch_size: Windows in a batch.
        second_moments: Keep second moments of what the down and attention output projections read, which
            ``subclone.refit`` needs: F x F and (query heads x head_dim)^2 numbers a layer.
    """

    tokens: int = 32768
    batch_size: int = 16
    second_moments: bool = False


@dataclass
class SubcloneConfig:
    """The shape of the smaller model, and how it is cut out. Exactly one way of saying the shape.

    Attributes:
        ratio: Residual width, FFN width and heads of the result over the source's; layers and head_dim stay.
        params: Number of parameters; the shape is then chosen by importance.
        residual: D of the result.
        ffn: F of the result.
        heads: Query heads of the result.
        kv_heads: Key and value heads of the result.
        head_dim: Channels of a head of the result.
        layers: Decoder layers of the result.
        order: What stays: the most ``importance``, or ``none``: the first ones.
        rescale: Multiply weights by sqrt(old / new fan-in).
        head_difference: Add what distinguishes pruned heads back into kept ones (Minitron).
        refit: Fit the down and attention output projections to the kept inputs by least squares.
        refit_ridge: Its ridge, relative to the mean second moment.
        shard_bytes: Largest shard that is written.
    """

    ratio: float | None = None
    params: float | None = None
    residual: int | None = None
    ffn: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    layers: int | None = None
    order: str = "importance"
    rescale: bool = True
    head_difference: bool = False
    refit: bool = False
    refit_ridge: float = 1e-2
    shard_bytes: int = 4 * 1024**3


@dataclass
class HypercloneConfig:
    """How much larger the result is, and how its copies differ.

    Attributes:
        factor: For residual width, FFN width and heads, where they are not given themselves.
        residual: Whole factor of the residual width.
        ffn: Factor of the FFN width, any number from 1, rounded to a whole neuron; or, from the source's width on, the
            width itself.
        heads: Whole factor of the query heads.
        kv_heads: ``scale`` with the query heads, ``same``, a whole factor, or ``auto``: scale, but for a single one.
        head_dim: Whole factor of a head's channels.
        layers: Decoder layers of the result; new ones begin as the identity. ``null`` keeps them.
        variant: ``noisy`` (symmetric, and the copies differ), ``symmetric`` or ``diagonal``.
        snr_db: Signal over noise in decibels, for ``noisy``.
        shard_bytes: Largest shard that is written.
    """

    factor: float = 1
    residual: float | None = None
    ffn: float | None = None
    heads: float | None = None
    kv_heads: str = "auto"
    head_dim: float = 1
    layers: int | None = None
    variant: str = "noisy"
    snr_db: float = 10.0
    shard_bytes: int = 4 * 1024**3


@dataclass
class SketchConfig:
    """Single neurons chosen by a few-bit copy of their weights (``experts: neurons``).

    Attributes:
        coarse_bits: Bits of the gate (of the one projection, where there is no gate) that are read of all neurons.
        bits: Bits of gate and up that are read of neurons which the first look finds near to being used.
        reach: How near, in nats: those that give exp(reach) times less than the least that is used are left out.
        low_bits: Bits of low-bit values, from ``bits`` to 8: the copy's.
        group: Adjacent weights of a neuron that share a scale and a minimum.
        values: ``mixed`` (exact for the most important neurons, low-bit for the next) or ``exact`` (no low-bit ones).
        means: Neurons that are off give their mean activation, not nothing.
    """

    coarse_bits: int = 2
    bits: int = 3
    reach: float = 0.5
    low_bits: int = 4
    group: int = 32
    values: str = "mixed"
    means: bool = True


@dataclass
class CarveConfig:
    """Cut in the order that profile found, and routers without training: ridge regressions on the FFN input.

    Attributes:
        ridge: Ridge strength relative to the mean of the feature covariance's diagonal.
        shard_bytes: Largest shard that is written.
    """

    ridge: float = 1e-3
    shard_bytes: int = 4 * 1024**3


@dataclass
class LossConfig:
    """How much one loss weighs, and from when on.

    Attributes:
        weight: What it is multiplied by; 0 leaves it out.
        after: Share of the steps for which it is left out.
        ramp: Share of the steps over which it then rises from nothing, in a straight line.
    """

    weight: float = 0.0
    after: float = 0.0
    ramp: float = 0.0


def _by(place: str) -> dict[str, str]:
    """Metadata of a loss: the class in ``dynaconv.train.objectives`` that computes it."""
    return {"objective": f"dynaconv.train.objectives.{place}"}


@dataclass
class LossesConfig:
    """What fine-tuning minimises: the weighted sum of these, in nats. Each is logged by itself.

    Each line names the class that computes the loss and says which passes it needs; a pass that no loss needs is left
    out. By default a step runs the full dial and one sampled dial, forward and backward, and the parent forward.

    Attributes:
        full: Cross-entropy at the full dial.
        dial: Cross-entropy at the sampled dial.
        distill: KL(teacher || sampled dial).
        distill_full: KL(parent || full dial): keeps the quality of the full dial.
        router: What ``curve`` and ``class`` routers learn from; ``width`` and ``linear`` ones learn from the losses at
            the dial.
        consistency: KL(higher dial || sampled dial) of a second, higher dial on the same batch.
    """

    full: LossConfig = field(default_factory=lambda: LossConfig(0.4), metadata=_by("language_model:FullDial"))
    dial: LossConfig = field(default_factory=LossConfig, metadata=_by("language_model:SampledDial"))
    distill: LossConfig = field(default_factory=lambda: LossConfig(0.8), metadata=_by("distillation:OfSampledDial"))
    distill_full: LossConfig = field(default_factory=lambda: LossConfig(0.8), metadata=_by("distillation:OfFullDial"))
    router: LossConfig = field(default_factory=lambda: LossConfig(1.0), metadata=_by("router_targets:RouterTargets"))
    consistency: LossConfig = field(default_factory=LossConfig, metadata=_by("consistency:Consistency"))


@dataclass
class FinetuneConfig:
    """Weights and routers at sampled budgets.

    Attributes:
        tokens: Training tokens.
        batch_size: Windows in one optimiser step.
        accumulation: Micro-batches a step is cut into.
        router: Kind of the routers. ``auto`` takes the one that learns from the losses at the dial: ``width`` (nested
            experts) or ``linear`` (routed ones). Nested experts also take ``curve``, ``class``, or ``uniform``: none.
        trainable: ``all``; ``ffn`` (FFNs and routers), ``routers`` (the full dial stays the parent's own function), or
            ``lora`` (routers, and adapters of low rank that are merged into the weights at the end).
        lora_rank: Rank of the adapters.
        lora_alpha: Their output is multiplied by this over the rank.
        teacher: ``self`` (the model's own full dial) or ``parent`` (the frozen dense checkpoint).
        losses: What is minimised.
        learning_rate: Peak for the weights.
        router_learning_rate: Peak for the routers.
        warmup_steps: Linear warm-up; cosine decay to zero follows.
        weight_decay: Decoupled weight decay on weight matrices.
        betas: How much AdamW keeps, each step, of its means of gradients and of their squares.
        clip: Largest gradient norm.
        explosion: Stop when a step's loss is so many nats above the mean of the 50 before it.
        full_share: Share of the steps, drawn at random, that train the full dial only.
        uniform_share: Share of the steps, at the start, in which all tokens get the same width; none where only
            ``routers`` train.
        budgets: Lowest and highest budget sampled. ``null`` takes those at which tokens use a sixteenth and six tenths
            of the neurons one by one, or a fifth and three quarters in blocks.
        distribution: Of the budgets between the two: ``uniform``, ``low`` (uniform in the logarithm: low ones are
            more frequent) or ``high`` (the mirror image).
        anchor: The one budget trained at towards the end; ``null`` samples all along.
        anchor_after: Share of the steps after which it is.
        router_rank: Hidden width of a router; ``null`` takes D / 16 rounded up to a multiple of 64, ``0`` makes routers
            linear.
        bound: Largest score: of a ``width`` router in blocks, of a ``linear`` one in nats. ``null`` takes that of the
            closed-form router that training starts from, else the kind's own.
        temperature: Width of the straight-through sigmoid, in the unit of scores.
        theta: Agreement (cosine) a ``class`` label asks for.
        precision: ``fp32`` or ``bf16``.
        gradient_checkpointing: Recompute activations in the backward pass.
        save_every: Steps between resumable states.
        statistics_every: Steps between statistics of the routers; ``0`` leaves them out.
        wandb: ``auto`` (online with a key, offline without), ``offline`` or ``off``.
    """

    tokens: int = 1_500_000
    batch_size: int = 4
    accumulation: int = 1
    router: str = "auto"
    trainable: str = "all"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    teacher: str = "parent"
    losses: LossesConfig = field(default_factory=LossesConfig)
    learning_rate: float = 6e-4
    router_learning_rate: float = 3e-4
    warmup_steps: int = 20
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.99])
    clip: float = 1.0
    explosion: float = 3.0
    full_share: float = 0.0
    uniform_share: float = 0.0
    budgets: list[float] | None = None
    distribution: str = "uniform"
    anchor: float | None = None
    anchor_after: float = 0.9
    router_rank: int | None = None
    bound: float | None = None
    temperature: float = 0.33
    theta: float = 0.8
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    save_every: int = 50
    statistics_every: int = 50
    wandb: str = "auto"


@dataclass
class CalibrateConfig:
    """The dial's grid and how it is measured.

    Attributes:
        budgets: Shares of the parent's FFN bytes to solve thresholds for; ``null`` takes a grid. 1 is always added.
        tokens: Validation tokens that thresholds are solved on; never those that are scored.
        score_tokens: Validation tokens that loss and agreement are scored on.
        batch_size: Windows in a batch.
        tolerance: Largest difference between the budget and what is spent.
        speed_tokens: Tokens generated at batch 1 for tokens/s; ``0`` leaves speed out.
    """

    budgets: list[float] | None = None
    tokens: int = 16384
    score_tokens: int = 20480
    batch_size: int = 16
    tolerance: float = 0.005
    speed_tokens: int = 64


@dataclass
class ExportConfig:
    """Where the result goes.

    Attributes:
        target: ``hf``: a folder that stock transformers loads, with the dial beside it.
        check: Reload the folder in a clean process and compare before publishing.
    """

    target: str = "hf"
    check: bool = True


@dataclass
class EngineConfig:
    """What training runs on. It changes how fast and in how much memory, not what comes out.

    Attributes:
        kind: ``torch``, or ``deepspeed``.
        nproc: Processes, one a GPU; on each machine where there is a hostfile.
        hostfile: The machines, as DeepSpeed's launcher reads them; ``None`` is this one.
        zero_stage: What DeepSpeed spreads over ranks: 1 optimiser state, 2 gradients too, 3 weights too; 0 nothing.
        offload_optimizer: Keep optimiser state in the machine's memory, and step there.
        offload_parameters: Keep the weights there as well; ``zero_stage`` 3 only.
        deepspeed_config: A JSON file of further DeepSpeed settings, none of which may contradict the recipe.
    """

    kind: str = "torch"
    nproc: int = 1
    hostfile: str | None = None
    zero_stage: int = 1
    offload_optimizer: bool = False
    offload_parameters: bool = False
    deepspeed_config: str | None = None


@dataclass
class RunConfig:
    """Everything one run depends on.

    Attributes:
        source: Folder or hub name of the dense checkpoint.
        stages: Stages in order.
        experts: What a token may use: single ``neurons``, chosen by a sketch of the weights; ``routed``, any blocks of
            neurons that are active together; ``nested``, the first so many blocks, by importance.
        blocks: Nested experts: how many blocks each FFN is cut into, from 1 to its neurons. ``None`` takes 8.
        block_size: Routed experts: neurons a block; the last block holds what is left. ``None`` takes 16, or fewer
            where an FFN has no 64 blocks of 16.
        seed: Seeds sampling, shuffling and initialisation.
        trust_remote_code: Let transformers run code from the source folder.
    """

    source: str = ""
    stages: list[str] = field(default_factory=lambda: ["profile", "carve", "calibrate", "export"])
    experts: str = "neurons"
    blocks: int | None = None
    block_size: int | None = None
    seed: int = 0
    trust_remote_code: bool = False
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: DataConfig = field(default_factory=DataConfig)
    importance: ImportanceConfig = field(default_factory=ImportanceConfig)
    subclone: SubcloneConfig = field(default_factory=SubcloneConfig)
    hyperclone: HypercloneConfig = field(default_factory=HypercloneConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    carve: CarveConfig = field(default_factory=CarveConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
