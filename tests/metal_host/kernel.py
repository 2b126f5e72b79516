"""HostKernel: what stands for a kernel of mx.fast.metal_kernel."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from . import build, launch
from .findings import Finding, HostError, KernelError, Run
from .generated import Generated, generate
from .lint import lint_launch, lint_source
from .session import Session, active_session


class HostKernel:
    """Called like a kernel of MLX's; runs on the CPU while host_kernels is active.

    Outside it calls MLX's own kernel, so that one kept in a cache does no harm.
    """

    def __init__(
        self,
        real: Callable[..., Any],
        name: str,
        input_names: Sequence[str],
        output_names: Sequence[str],
        source: str,
        header: str = "",
        ensure_row_contiguous: bool = True,
        **settings: Any,
    ):
        self.name = name
        self._input_names, self._output_names = list(input_names), list(output_names)
        self._source, self._header = source, header
        self._contiguous = ensure_row_contiguous
        self._real = real(
            name=name,
            input_names=self._input_names,
            output_names=self._output_names,
            source=source,
            header=header,
            ensure_row_contiguous=ensure_row_contiguous,
            **settings,
        )
        self._generated: dict[Any, Generated] = {}
        self._linted: dict[Any, list[Finding]] = {}
        self._built: dict[Any, build.Built | list[Finding]] = {}

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        settings: dict[str, Any] = {
            "output_shapes": output_shapes,
            "output_dtypes": output_dtypes,
            "grid": grid,
            "threadgroup": threadgroup,
            "template": template,
            "init_value": init_value,
            "verbose": verbose,
        }
        session = active_session()
        if session is None:
            return self._real(inputs=inputs, stream=stream, **settings)
        arrays = [a if isinstance(a, mx.array) else mx.array(a) for a in inputs]
        self._evaluate(arrays)
        key = self._key(arrays, output_dtypes, template)
        if verbose or key not in self._generated:
            self._generated[key] = generate(
                self._real, arrays, settings, header=self._header, body=self._source
            )
        record = Run(
            kernel=self.name,
            seed=session.seed,
            checked=session.checked,
            grid=_three(grid),
            threadgroup=_three(threadgroup),
            source=self._generated[key].text,
        )
        session.runs.append(record)
        built = self._prepare(key, session, record)
        session.judge(record)
        if built is None:
            raise KernelError(self.name, record.findings)
        results = self._launch(
            built, key, arrays, output_shapes, output_dtypes, init_value, record
        )
        session.judge(record)
        return results

    def _evaluate(self, arrays: list[mx.array]) -> None:
        try:
            mx.eval(arrays)
        except (RuntimeError, ValueError) as error:
            raise HostError(
                f"Kernel '{self.name}' is called while MLX traces a function, but its "
                f"inputs must have values here. Call the function without mx.compile, "
                f"mx.vmap or mx.export_function ({error})."
            ) from error

    @staticmethod
    def _key(
        arrays: list[mx.array],
        output_dtypes: Sequence[mx.Dtype],
        template: Sequence[tuple[str, Any]] | None,
    ) -> Any:
        """What MLX's signature depends on."""
        kinds = tuple((a.dtype, a.ndim, a.size < 8) for a in arrays)
        return kinds, tuple(output_dtypes), tuple(template or ())

    def _prepare(self, key: Any, session: Session, record: Run) -> build.Built | None:
        """Lint and build; the findings go to the record."""
        generated = self._generated[key]
        start = time.perf_counter()
        worker = None
        if session.lint and key not in self._linted:
            self._linted[key] = lint_source(self._header, self._source)
            # clang runs in a process of its own: two at a time halve the wait.
            spaces: list[Finding] = []
            worker = threading.Thread(
                target=lambda: spaces.extend(build.lint_spaces(generated))
            )
            worker.start()
        mode = (key, session.checked)
        fresh = mode not in self._built
        if fresh:
            launch.load_runtime()
            self._built[mode] = build.compile_kernel(generated, session.checked)
        if worker is not None:
            worker.join()
            self._linted[key] = self._linted[key] + spaces
        if session.lint:
            record.findings += self._linted[key]
            launched = lint_launch(
                self._header + self._source, record.grid, record.threadgroup
            )
            for finding in launched:
                remark = finding.kind == "remark"
                (record.remarks if remark else record.findings).append(finding)
        record.build_seconds = time.perf_counter() - start if fresh else 0.0
        built = self._built[mode]
        if isinstance(built, build.Built):
            return built
        record.findings = [*build.without_repeats(record.findings, built), *built]
        return None

    def _launch(
        self,
        built: build.Built,
        key: Any,
        arrays: list[mx.array],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        init_value: float | None,
        record: Run,
    ) -> list[mx.array]:
        inputs = {
            name: launch.strided(array, contiguous=self._contiguous)
            for name, array in zip(self._input_names, arrays, strict=True)
        }
        outputs = {
            name: launch.empty(tuple(shape), dtype, init_value)
            for name, shape, dtype in zip(
                self._output_names, output_shapes, output_dtypes, strict=True
            )
        }
        return launch.launch(
            built,
            self._generated[key],
            inputs,
            outputs,
            record,
            initialised=init_value is not None,
        )


def _three(size: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (int(n) for n in size)
    return x, y, z
