"""The sections of a config that are plain data: their keys, and what each means.

Sections that name classes (``model``, data sets, hooks, metrics) are checked against the constructors of those classes,
``train_cfg`` and ``test_cfg`` against what the classes declare that they read; see ``check.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(kw_only=True)
class TopLevel:
    """Names at the top level of a config that have a meaning; others are helper variables."""

    name: str | None = None
    """Name of the run; by default the stem of the file."""
    model: Mapping[str, Any] | None = None
    """The trainable whole, ``dict(type='LatentDiffusionClassImage', ...)``."""
    train_cfg: Mapping[str, Any] | None = None
    """How the model trains; shared by the whole, its diffusion and its teacher."""
    test_cfg: Mapping[str, Any] | None = None
    """How the model samples."""
    optimizer: Mapping[str, Any] | None = None
    """Submodule path -> ``dict(type='AdamW', lr=...)``."""
    lr_config: Mapping[str, Any] | None = None
    """Learning rate over time, see :class:`LearningRate`."""
    data: Mapping[str, Any] | None = None
    """Data sets by split, and loaders, see :class:`Loader`."""
    total_iters: int | None = None
    """Iterations of the whole run."""
    checkpoint_config: Mapping[str, Any] | None = None
    """Arguments of ``CheckpointHook``; None saves nothing."""
    evaluation: Sequence[Any] | None = None
    """A list of hooks ``dict(type='GenerativeEvalHook', data=<split>, ...)``."""
    log_config: Mapping[str, Any] | None = None
    """Logs, see :class:`Log`."""
    custom_hooks: Sequence[Any] | None = None
    """A list of hooks; ``priority`` may be given beside their arguments."""
    runner: Mapping[str, Any] | None = None
    """The loop, see :class:`Loop`."""
    load_from: str | None = None
    """Checkpoint whose weights a new run starts from."""
    resume_from: str | None = None
    """Checkpoint to continue from; ``latest`` in the run's own directory means: if there is one."""
    work_dir: str | None = None
    """Directory of the logs; by default ``work_dirs/<name>``. Of a remote one (``s3://bucket/x``), ``work_dirs/x`` is
    written to and copied there."""
    work_dir_mirror: str | None = None
    """Remote directory to which the logs are copied while they are written."""
    seed: int | None = None
    """Seed of the run; by default 2021."""
    custom_imports: Mapping[str, Any] | None = None
    """Modules to import first, see :class:`CustomImports`."""
    module_wrapper: str | None = None
    """Parallel strategy of several processes."""
    fsdp_kwargs: Mapping[str, Any] | None = None
    """Arguments of the strategies that shard."""
    find_unused_parameters: bool = False
    """For DDP."""
    dist_params: Mapping[str, Any] | None = None
    """How several processes find each other."""
    log_level: str = 'INFO'
    """Least level that is logged."""
    cudnn_benchmark: bool = False
    """Let cuDNN time its algorithms first."""
    cudnn_attention: bool = True
    """False: attention is never computed by cuDNN."""
    workflow: Sequence[Any] | None = None
    opencv_num_threads: int | None = None
    mp_start_method: str | None = None
    optimizer_config: Mapping[str, Any] | None = None
    momentum_config: Mapping[str, Any] | None = None
    fp16: Any = None
    apex_amp: Any = None


@dataclass(kw_only=True)
class Loader:
    """Loader arguments, in ``data`` for all loaders or in ``data.<train|val|test>_dataloader`` for one kind."""

    samples_per_gpu: int | None = None
    """Batch size of one process."""
    workers_per_gpu: int = 0
    """Worker processes of one process; 0 loads in the process itself."""
    persistent_workers: bool = False
    """Keep workers between passes."""
    prefetch_factor: int | None = None
    """Batches that each worker loads ahead."""
    pin_memory: bool = False
    """Load into page-locked memory."""
    timeout: float = 0
    """Seconds to wait for a worker; 0 for ever."""
    multiprocessing_context: str | None = None
    """How workers are started: ``fork``, ``spawn`` or ``forkserver``."""


@dataclass(kw_only=True)
class LearningRate:
    """``lr_config``; arguments of the policy (``step``, ``gamma``, ``power``, ``min_lr`` ...) stand beside these."""

    policy: str = 'fixed'
    """``fixed``, ``step``, ``exp``, ``poly``, ``inv``, ``CosineAnnealing`` or ``FlatCosineAnnealing``."""
    warmup: str | None = None
    """``linear``, ``constant``, ``exp`` or None."""
    warmup_iters: int = 0
    """Iterations of warm-up."""
    warmup_ratio: float = 0.1
    """Factor of the learning rate at the start, in (0, 1]."""
    by_epoch: bool = False
    """Only False: schedules count iterations."""


@dataclass(kw_only=True)
class Log:
    """``log_config``."""

    interval: int = 50
    """Iterations between log lines; also the window of averages."""
    all_ranks: bool = False
    """Whether every process writes a log file of its own."""
    hooks: Sequence[Any] = ({'type': 'TensorboardLoggerHook'},)
    """``dict(type='TextLoggerHook')``, ``'TensorboardLoggerHook'`` or ``'WandbLoggerHook'``."""


@dataclass(kw_only=True)
class Loop:
    """``runner``."""

    type: str = 'DynamicIterBasedRunner'
    """The only loop there is; the name is accepted for the sake of published configs."""
    pass_training_status: bool = True
    """The iteration is always passed to the model."""
    ckpt_trainable_only: bool = True
    """Save only what is trained (and its averages)."""
    gc_interval: int = 20
    """Collect garbage by hand every so many iterations; 0 or less leaves it to Python."""
    max_skipped_iters: int = 20
    """Iterations in a row without a step (loss or gradient not finite) that end the run."""
    auto_resume: bool = True
    """Continue from the run's own newest checkpoint if there is one."""
    watchdog_seconds: float = 1800
    """Seconds without a sign of progress after which a run is taken to hang, says where, and ends; 0 for never."""


@dataclass(kw_only=True)
class Sharding:
    """``fsdp_kwargs``, read by the strategies that divide weights among processes."""

    fsdp_modules: Sequence[str] = ()
    """What is gathered one at a time: dotted paths of classes, or patterns of names; empty for the repeated blocks."""
    exclude_keys: Sequence[str] = ()
    """Children of the model that every process holds whole."""
    wrap_frozen_modules: bool = False
    """Divide what is frozen too."""
    ignore_frozen_parameters: bool = False
    """Leave frozen parameters of a divided module whole."""
    param_dtype: str | None = None
    """Precision that weights are gathered in; None for their own. What computes in float32 keeps it."""
    reduce_dtype: str | None = 'float32'
    """Precision that gradients are summed in; None for their own."""
    buffer_dtype: str | None = None
    """Precision of buffers; None for their own."""
    hybrid_sharding: bool = True
    """Divide within a node and repeat between nodes."""
    shard_size: int | None = None
    """Number of processes that share one copy; None for those of a node, or all."""
    sync_every_pass: bool = False
    """Exchange gradients after every micro-batch and segment: less memory, more traffic."""


@dataclass(kw_only=True)
class Processes:
    """``dist_params``."""

    backend: str | None = None
    """``nccl``, ``gloo``, or by device ``cpu:gloo,cuda:nccl``; None for nccl on GPUs and gloo on CPUs."""
    timeout: float = 3600
    """Seconds that processes wait for each other."""
    port: int | None = None
    """Where processes meet under Slurm and MPI; by default MASTER_PORT, or a port that follows from the job."""


@dataclass(kw_only=True)
class CustomImports:
    """``custom_imports``."""

    imports: Sequence[str] | str
    """Modules to import, so that their classes are registered."""
    allow_failed_imports: bool = False
    """Only warn if one cannot be imported."""


HELPER_NAMES = frozenset(
    {
        'data_split',
        'prefix',
        'step',
        'substep',
        'steps',
        'metrics',
        'metric',
        'methods',
        'method',
        'temperature',
        'temperatures',
        'guidance_scale',
        'guidance_scales',
        'save_interval',
        'must_save_interval',
        'eval_interval',
        'data_root',
        'batch_size',
        'nfe',
    }
)
"""Usual helper variables; never taken for misspelt sections."""

MODULE_WRAPPERS = ('ddp', 'fsdp', 'fsdp2')
LOG_LEVELS = ('DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL')
FROZEN_PARTS = ('teacher', 'vae', 'text_encoder')
"""Children of the model that no optimiser may name."""
PARAMWISE_KEYS = ('custom_keys',)
MULTIPLIERS = ('lr_mult', 'decay_mult')
"""What ``paramwise_cfg.custom_keys.<pattern>`` may hold."""

LEAST_OF_LOADER = {'samples_per_gpu': 1, 'workers_per_gpu': 0, 'prefetch_factor': 1}
LEAST_OF_CHECKPOINTS = {'interval': 1, 'must_save_interval': 1}
LEAST_OF_EVALUATION = {'viz_num': 0, 'feed_batch_size': 1}
LEAST_OF_LOOP = {'max_skipped_iters': 0}

LOOP_TYPES = ('DynamicIterBasedRunner', 'DynamicIterBasedRunnerMod', 'IterBasedRunner')
LOGGER_TYPES = ('TextLoggerHook', 'TensorboardLoggerHook', 'WandbLoggerHook')

OPTIMIZER_KEY_PATTERNS = ('{}_grad_clip', '{}_grad_clip_begin_iter', '{}_grad_clip_skip_ratio')
"""Keys of ``train_cfg`` that exist once per key of ``optimizer``."""
TRAINING_STEP_KEYS = ('grad_accum_batch_size',)
"""Keys of ``train_cfg`` that every training step reads."""

LOADER_SECTIONS = ('data', 'data.train_dataloader', 'data.val_dataloader', 'data.test_dataloader')
LEGACY_OF_LOADER = {
    'num_threads': 'it is no argument of a data loader',
    'num_gpus': 'every process has a loader and a GPU of its own',
    'dist': 'data are always shared by all processes of a run',
    'drop_last': 'training has no incomplete batch, and evaluation reads every item',
}

LEGACY_KEYS: dict[str, str] = {
    'workflow': 'training and evaluation are scheduled by their intervals',
    'mp_start_method': 'set data.multiprocessing_context to choose how workers start',
    'opencv_num_threads': 'no OpenCV threads are used',
    'optimizer_config': 'gradient clipping is set in train_cfg (<key>_grad_clip)',
    'momentum_config': 'momentum is constant',
    **{f'{section}.{key}': reason for section in LOADER_SECTIONS for key, reason in LEGACY_OF_LOADER.items()},
    'runner.ckpt_fp16': 'what a run resumes from is never rounded',
    'runner.ckpt_fp16_ema': 'what a run resumes from is never rounded',
    'runner.ckpt_bf16_optim': 'what a run resumes from is never rounded',
    'runner.is_dynamic_ddp': 'strategies are chosen by module_wrapper',
    'runner.fp16_loss_scaler': 'parameters are trained in float32 or bfloat16, which need no loss scaling',
    'runner.use_apex_amp': 'apex is not used',
    'checkpoint_config.create_symlink': 'the newest checkpoint is found without links',
    'checkpoint_config.filename_tmpl': 'checkpoints are named iter_<N>',
    'checkpoint_config.sync_buffer': 'buffers are saved as they are',
    'lr_config.warmup_by_epoch': 'schedules count iterations',
    'fsdp_kwargs.tie_key_mappings': 'what teacher, student and average share follows from tie_teacher and tie_ema',
    'fsdp_kwargs.use_orig_params': 'parameters always keep their own identity',
}
"""Dotted keys of the published schema that are accepted and have no effect here -> why."""

LEGACY_ARGUMENTS: dict[str, dict[str, str]] = {
    'GenerativeEvalHook': {
        'clear_reals': 'features of real images are kept in files',
        'dist': 'whether several processes evaluate follows from how many there are',
    },
    'InceptionMetrics': {
        'inception_args': 'the network is that of inception-2015-12-05, unless extractor names another one',
        'bgr2rgb': 'images are RGB',
        'pr_row_batch_size': 'distances are computed in blocks anyway',
        'pr_col_batch_size': 'distances are computed in blocks anyway',
    },
    'TextLoggerHook': {
        'by_epoch': 'lines count iterations',
        'ignore_last': 'the last line is always written',
        'out_dir': 'logs are in work_dir',
        'interval_exp_name': 'the name of the run is in its first lines',
        'reset_flag': 'averages are of the last interval',
    },
    'TensorboardLoggerHook': {
        'by_epoch': 'curves count iterations',
        'ignore_last': 'the last point is always written',
        'reset_flag': 'averages are of the last interval',
    },
    'WandbLoggerHook': {
        'by_epoch': 'curves count iterations',
        'ignore_last': 'the last point is always written',
        'reset_flag': 'averages are of the last interval',
        'log_artifact': 'logs and checkpoints are not uploaded',
        'out_suffix': 'logs and checkpoints are not uploaded',
        'with_step': 'curves count iterations',
        'commit': 'all of an iteration is one row, sent when the next one begins',
    },
}
"""Hook -> arguments of the published schema that are accepted and have no effect here -> why."""

EMPTY_KEYS: dict[str, str] = {
    'data.sampler': 'the order of the data is a function of the seed',
    'runner.pass_training_status': 'the iteration is always passed to the model',
    'model.use_condition_latents': 'there are no condition images',
    'model.train_cached_latents_as_latents_2': 'there is one kind of latents',
    'model.vae_2': 'there is one autoencoder',
    'model.visual_encoder': 'there are no condition images',
    'train_cfg.teacher_test_cfg_2': 'the teacher is asked once',
}
"""Dotted keys that may be present while they say None, False or nothing, without effect -> why."""

INCEPTION_TYPE, INCEPTION_FILE = 'StyleGAN', 'inception-2015-12-05'
"""What ``inception_args`` of the published schema names where it asks for the network that is used anyway."""

UNREAD_BY: dict[str, dict[str, str]] = {
    'DX': {'train_cfg.gm_dropout': 'a DX policy has no components to drop'},
}
"""Type of the student, or of its policy -> dotted keys that published files have for it, without effect -> why."""

SHARDING_WRAPPERS = ('fsdp', 'fsdp2')
DISTRIBUTED_KEYS = ('fsdp_kwargs', 'find_unused_parameters', 'dist_params')
"""Top-level keys that only runs of several processes read."""

RENAMED_TYPES: dict[str, str] = {'ExponentialMovingAverageHookMod': 'ExponentialMovingAverageHook'}
"""Published name of a hook -> its name here."""

OLDER_TRAIN_KEYS: dict[str, str] = {
    'teacher_guidance_scale': 'teacher_test_cfg.guidance_scale',
    'teacher_distilled_guidance_scale': 'teacher_test_cfg.distilled_guidance_scale',
    'gm_dropout': 'policy_dropout',
}
"""Older key of ``train_cfg`` that is still read -> its present place there."""

OLDER_TEACHER_KEYS = ('guidance_interval', 'orthogonal_guidance')
"""Keys of ``test_cfg`` that guide the teacher of files that have ``train_cfg.teacher_guidance_scale``."""

REFUSED_KEYS: dict[str, str] = {
    'fp16': "choose precision by the network's torch_dtype and autocast_dtype",
    'apex_amp': "apex is not supported; choose precision by the network's torch_dtype and autocast_dtype",
}
"""Top-level keys whose effect would silently be missing -> what to do instead."""
