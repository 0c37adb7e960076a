"""Loads adapters of pi-Flow into pipelines of diffusers, and saves them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from lakonlab.models.architecture.adapters import POLICY_KEY
from lakonlab.pipelines.adapter_files import (
    CONFIG_FILE,
    HUB_OPTIONS,
    AdapterError,
    PiFlowAdapter,
    load_adapter_files,
    read_index,
    weights_name,
)
from lakonlab.pipelines.piflow_styles import PiFlowStylesMixin
from lakonlab.pipelines.policy_arguments import is_close, is_number, wrong_argument
from lakonlab.pipelines.recipe import PUBLISHED, RECIPE_KEY
from lakonlab.pipelines.student import MEANS, OUTPUT, Student, make_student, uncompiled, updated_base
from lakonlab.pipelines.student_lora import guard_base, is_fused, is_there, own_tensors

logger = logging.getLogger(__name__)

SAME = 1e-6
#: Folder of a saved pipeline with the adapters of its modules, one folder each.
SAVED_ADAPTERS = 'piflow_adapters'
#: File in it: module -> name of its low-rank matrices, and whether the adapter sets the scheduler.
SAVED_INDEX = 'adapters.json'


class PiFlowLoaderMixin(PiFlowStylesMixin):
    """Gives a pipeline of diffusers the methods that load, unload and save adapters of pi-Flow."""

    latent_layout: str = 'tokens'
    """See :data:`lakonlab.pipelines.student.ROW_ORDER_OF`."""
    policy_type: str | None = None
    policy_kwargs: Mapping[str, Any] = {}
    _adopts_schedules = True

    def load_piflow_adapter(
        self,
        pretrained_model_name_or_path: str | Path,
        target_module_name: str = 'transformer',
        adapter_name: str | None = None,
        *,
        subfolder: str | None = None,
        variant: str | None = None,
        use_safetensors: bool | None = None,
        low_cpu_mem_usage: bool | None = None,
        disable_mmap: bool | None = None,
        **hub_options: Any,
    ) -> str | None:
        """Make a few-step generator of the pipeline.

        The transformer is replaced by a student that shares its weights, whatever their precision or quantisation. The
        scheduler of diffusers gets the shift that the adapter was trained with; a ``FlowMapSDEScheduler`` stays.

        Args:
            pretrained_model_name_or_path: Folder, URL of a folder, or repository of the Hugging Face hub.
            target_module_name: Module of the pipeline that it is an adapter of.
            adapter_name: Name for its low-rank matrices, for ``set_adapters``, without dots; None for
                ``'<target_module_name>_piflow'``.
            subfolder: Folder in it.
            variant: Middle part of the name of the file, such as ``'fp16'``.
            use_safetensors: Must not be False: pickles are not read.
            low_cpu_mem_usage: Of the published method; has no effect, since the base is never copied.
            disable_mmap: Of the published method; has no effect.
            **hub_options: ``revision``, ``token``, ``cache_dir``, ``force_download``, ``local_files_only``.

        Returns:
            The name of the low-rank matrices; None if the adapter has none.

        Raises:
            AdapterError: There is no such adapter, it cannot be read, or it is for another base.
            ValueError: The pipeline has an adapter already, styles are fused with its weights, or the name is none.
        """
        if adapter_name is not None and (not adapter_name or '.' in adapter_name):
            raise ValueError(f'adapter_name={adapter_name!r}: expected a name without dots')
        if use_safetensors is False:
            raise AdapterError('use_safetensors=False: adapters are read from safetensors only, which hold no code')
        base = getattr(self, target_module_name, None)
        if not isinstance(base, nn.Module):
            modules = [name for name, value in self.components.items() if isinstance(value, nn.Module)]
            raise ValueError(
                f'target_module_name={target_module_name!r} is no module of {type(self).__name__}: it has '
                f'{", ".join(modules)}'
            )
        if getattr(base, 'piflow', None) is not None:
            raise ValueError(
                f'the {target_module_name} has the adapter {base.piflow.where!r} already: call '
                'unload_piflow_adapter first, or use a second pipeline, which can share the base'
            )
        if is_fused(base):
            raise ValueError(
                f'styles are fused with the weights of the {target_module_name}, which the student would share: call '
                'unfuse_lora first and load the styles after the adapter, or leave them in the weights for good by '
                'unload_lora_weights'
            )
        adapter = load_adapter_files(
            pretrained_model_name_or_path, subfolder, target_module_name, variant, **hub_options
        )
        policy = self._policy_of(adapter)
        restore = self._suspend_offloading()
        try:
            student = make_student(
                base, adapter, self.latent_layout, policy, adapter_name or f'{target_module_name}_piflow'
            )
            guard_base(student)
            setattr(self, target_module_name, student)
        finally:
            restore()
        self._adopt_schedule(student.piflow)
        return student.piflow.adapter_name

    def load_lakonlab_adapter(self, *args, **kwargs) -> str | None:
        """Another name of :meth:`load_piflow_adapter`."""
        return self.load_piflow_adapter(*args, **kwargs)

    def unload_piflow_adapter(self, target_module_name: str = 'transformer') -> None:
        """Go back to the transformer that an adapter was loaded into; styles that were loaded since are gone too.

        So does the scheduler, if it still is the one that was set for the adapter.

        Raises:
            ValueError: There is no adapter, or its matrices are fused with the base's weights.
        """
        student = uncompiled(getattr(self, target_module_name, None))
        record: Student | None = getattr(student, 'piflow', None)
        if record is None:
            raise ValueError(f'the {target_module_name} has no adapter of pi-Flow')
        _refuse_fused(student)
        restore = self._suspend_offloading()
        setattr(self, target_module_name, updated_base(student).to(student.device))
        restore()
        if record.scheduler is not None and self.scheduler is record.scheduler:
            self.scheduler = record.own_scheduler

    def _students(self) -> dict[str, nn.Module]:
        return {
            name: uncompiled(module)
            for name, module in self.components.items()
            if isinstance(module, nn.Module) and getattr(module, 'piflow', None) is not None
        }

    def save_piflow_adapter(self, save_directory: str | Path, target_module_name: str = 'transformer') -> None:
        """Write the adapter of a module, to be loaded by :meth:`load_piflow_adapter`.

        Args:
            save_directory: Folder, made if need be.
            target_module_name: The module.

        Raises:
            ValueError: Its matrices are fused with the weights, or were deleted.
        """
        from safetensors.torch import save_file

        student = uncompiled(getattr(self, target_module_name))
        record: Student = student.piflow
        _refuse_incomplete(student)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {'format': 'pt', POLICY_KEY: json.dumps({**record.policy_kwargs, 'type': record.policy_type})}
        if record.recipe is not None:
            metadata[RECIPE_KEY] = record.recipe.to_json()
        save_file(own_tensors(student), folder / weights_name(), metadata)
        config = json.dumps(record.adapter_config, indent=2)
        (folder / CONFIG_FILE).write_text(f'{config}\n', encoding='utf-8')

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in the base class: the base as it was, and the adapters beside it in ``piflow_adapters/``.

        The scheduler is that of the base too, unless another was chosen since the adapter was loaded.

        Raises:
            ValueError: Matrices are fused with the weights, or were deleted, or the base has styles.
        """
        students = self._students()
        for student in students.values():
            _refuse_incomplete(student)
            if getattr(student.piflow.base, 'peft_config', None):
                raise ValueError(
                    'the base has styles that were loaded before the adapter, which cannot be saved with it: load the '
                    'styles after the adapter'
                )
        index = {}
        replaced = {name: self.__dict__[name] for name in (*students, *(['scheduler'] if students else []))}
        try:
            for name, student in students.items():
                record: Student = student.piflow
                self.save_piflow_adapter(Path(save_directory, SAVED_ADAPTERS, name), name)
                sets_scheduler = record.scheduler is not None and self.scheduler is record.scheduler
                index[name] = {'adapter_name': record.adapter_name, 'sets_scheduler': sets_scheduler}
                self.__dict__[name] = updated_base(student)
                if sets_scheduler:
                    self.__dict__['scheduler'] = record.own_scheduler
            _remove_others(Path(save_directory, SAVED_ADAPTERS), students)
            if index:
                text = json.dumps(index, indent=2)
                Path(save_directory, SAVED_ADAPTERS, SAVED_INDEX).write_text(f'{text}\n', encoding='utf-8')
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.__dict__.update(replaced)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs):
        """As in the base class; adapters that :meth:`save_pretrained` wrote, also to a repository, are loaded too.

        Except those of modules that are given as None or with an adapter.
        """
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        place = str(pretrained_model_name_or_path)
        options = {name: kwargs[name] for name in HUB_OPTIONS if name in kwargs}
        for name, saved in read_index(place, SAVED_ADAPTERS, SAVED_INDEX, options).items():
            given: Student | None = getattr(kwargs.get(name), 'piflow', None)
            if name in kwargs and kwargs[name] is None:
                continue
            if given is not None:
                if given.scheduler is not None and 'scheduler' not in kwargs:
                    pipe.scheduler = given.scheduler
                continue
            pipe._adopts_schedules = saved.get('sets_scheduler', True) and 'scheduler' not in kwargs
            subfolder = f'{SAVED_ADAPTERS}/{name}'
            try:
                pipe.load_piflow_adapter(place, name, saved.get('adapter_name'), subfolder=subfolder, **options)
            finally:
                del pipe._adopts_schedules
        return pipe

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """As in the base class; what the other pipeline was told about the policy goes with it."""
        for name in ('policy_type', 'policy_kwargs'):
            if hasattr(pipeline, name):
                kwargs.setdefault(name, getattr(pipeline, name))
        return super().from_pipe(pipeline, **kwargs)

    def _policy_of(self, adapter: PiFlowAdapter) -> dict[str, Any]:
        """Type and arguments of the policy, from the file, its head, and the pipeline's arguments."""
        by_head = 'GMFlow' if f'{MEANS}.weight' in adapter.tensors else 'DX'
        has_head = any(name.startswith(OUTPUT) for name in adapter.tensors)
        for place, kind in {'the file': adapter.policy.get('type'), 'policy_type': self.policy_type}.items():
            if has_head and kind not in (None, by_head):
                raise AdapterError(f'{adapter.where!r}: {place} says {kind!r}, but its head is that of {by_head!r}')
        policy = {**adapter.policy, **self.policy_kwargs, 'type': by_head}
        for name, told in self.policy_kwargs.items():
            stated = adapter.policy.get(name, told)
            if not (is_close(stated, told) if is_number(stated) and is_number(told) else stated == told):
                logger.warning(
                    '%r says that its policy has %s=%s, which is replaced by %s=%s of policy_kwargs: leave these out '
                    'where the file tells',
                    adapter.where,
                    name,
                    stated,
                    name,
                    told,
                )
        problem = wrong_argument(by_head, {name: value for name, value in policy.items() if name != 'type'})
        if problem is not None:
            raise AdapterError(f'{adapter.where!r}: {problem}')
        return policy

    def _adopt_schedule(self, student: Student) -> None:
        """Let the adapter set the shift of diffusers' scheduler; one without a recipe unless the user has done so."""
        own, recipe = self.scheduler, student.recipe
        if not self._adopts_schedules or not isinstance(own, FlowMatchEulerDiscreteScheduler):
            return
        config = own.config
        is_fixed = not config.use_dynamic_shifting and not config.get('shift_terminal')
        if recipe is None:
            if is_fixed:
                return  # chosen by the user
            recipe = PUBLISHED
            if student.policy_type == 'DX':
                recipe = replace(PUBLISHED, shift=student.policy_kwargs.get('shift', 1.0))
            logger.info('%r carries no recipe: it is sampled as published adapters are, %s', student.where, recipe)
        if recipe.shift is None:
            logger.warning(
                '%r was trained with a shift that depends on the size of images, which pipelines count otherwise: set '
                'the scheduler yourself; %s stays as it is',
                student.where,
                type(own).__name__,
            )
            return
        if is_fixed and abs(own.shift - recipe.shift) > SAME:
            logger.warning(
                '%r was trained for shift=%s, which the scheduler gets in place of its %s',
                student.where,
                recipe.shift,
                own.shift,
            )
        settings = dict(shift=recipe.shift, use_dynamic_shifting=False, shift_terminal=None)
        student.own_scheduler, student.scheduler = own, type(own).from_config(config, **settings)
        self.scheduler = student.scheduler

    def _suspend_offloading(self):
        """Bring all modules back whole; returns what offloads them again."""
        by_model, by_layer, by_group = self._optionally_disable_offloading(self)
        if by_group:
            raise ValueError('adapters of pi-Flow are loaded before enable_group_offload, not after it')
        device = getattr(self, '_offload_device', None)
        options = {} if device is None else {'device': device}

        def restore() -> None:
            if by_model:
                self.enable_model_cpu_offload(**options)
            elif by_layer:
                self.enable_sequential_cpu_offload(**options)

        return restore


def _remove_others(folder: Path, kept: Iterable[str]) -> None:
    """Remove the adapters that were saved earlier, of modules that have none now, and what lists them."""
    if not folder.is_dir():
        return
    (folder / SAVED_INDEX).unlink(missing_ok=True)
    for child in sorted(child for child in folder.iterdir() if child.is_dir() and child.name not in kept):
        for name in (CONFIG_FILE, weights_name()):
            (child / name).unlink(missing_ok=True)
        if not any(child.iterdir()):
            child.rmdir()
    if not any(folder.iterdir()):
        folder.rmdir()


def _refuse_fused(student: nn.Module) -> None:
    if is_fused(student):
        raise ValueError('adapters are fused with the weights: call unfuse_lora first')


def _refuse_incomplete(student: nn.Module) -> None:
    _refuse_fused(student)
    name = student.piflow.adapter_name
    if name is not None and not is_there(student, name):
        raise ValueError(f'the adapter {name!r} of pi-Flow was deleted: unload_piflow_adapter, and load it again')
