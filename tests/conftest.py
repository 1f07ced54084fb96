"""Eight fake CPU devices for the sharding tests, quick compilation, markers."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

# Programs here are small and run a few times: what costs is compiling them, so optimise little.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads would spin, waiting for a core
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import jax
import pytest

jax.config.update("jax_traceback_in_locations_limit", 0)  # nobody reads where an operation is from
# Programs that a shell starts in the background ignore it, and so would those that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.set_threshold(100_000)  # traced programs are many objects that stay: going over them costs

# The files that take longest, which workers begin with: none is left alone at the end.
LONGEST = (
    "test_benchmarks.py",
    "test_generation.py",
    "test_laws.py",
    "test_compose.py",
    "test_step.py",
    "test_attention.py",
    "test_gka.py",
    "test_distill.py",
    "test_model.py",
    "test_lora.py",
    "test_attention_mosaic.py",
    "test_operators.py",
    "test_gated_delta_rule.py",
    "test_oracle.py",
    "test_stage0.py",
    "test_gka_mosaic.py",
    "test_model_goldens.py",
    "test_chat.py",
    "test_two_window_attention.py",
    "test_slots.py",
    "test_causal_conv1d.py",
    "test_families.py",
    "test_gka_decode.py",
    "test_ssd.py",
    "test_train.py",
)


# Slow, too: what takes long and is asserted more cheaply by others (a kernel's law by the model's,
# a command by the function behind it, a step by its parts, an operand by another one).
OVERLAPPING = (
    "test_attention.py::test_any_split_equals_the_whole",
    "test_attention.py::test_auto_looks_at_the_scale",
    "test_attention.py::test_lengths_equal_segment_ids",
    "test_attention.py::test_packed_equals_separate",
    "test_attention_mosaic.py::test_causal_attention[options0-keywords0]",
    "test_attention_mosaic.py::test_every_visible_pair_is_visited",
    "test_attention_mosaic.py::test_log_sum_exp",
    "test_attention_mosaic.py::test_queries_continue_a_cache[None-True]",
    "test_attention_mosaic.py::test_two_windows_continue_a_sequence",
    "test_attention_mosaic.py::test_two_windows_of_packed_documents",
    "test_benchmarks.py::test_checkpoint_as_from_a_new_model",
    "test_benchmarks.py::test_models[mixer,mixer_decode]",
    "test_benchmarks.py::test_models[ttft]",
    "test_benchmarks.py::test_operators_give_complete_rows[bfloat16-ssd-decode-0.03]",
    "test_compose.py::test_recorded_by_the_original[picaso_m2]",
    "test_chat.py::test_generate_text_is_generate_between_two_codecs",
    "test_cli.py::test_as_a_process[hmf_jax.cli]",
    "test_cli.py::test_convert_there_and_back",
    "test_cli.py::test_generate_is_generate_text",
    "test_cli.py::test_verify",
    "test_compose.py::test_keys_and_values_follow_each_other",
    "test_compose.py::test_recorded_by_the_original[picaso_gka]",
    "test_compose.py::test_states_are_means_or_nothing",
    "test_config.py::test_the_command",
    "test_contributing.py::TestOperator::test_gradients_equal_reference",
    "test_contributing.py::TestOperator::test_padding_is_a_no_op",
    "test_contributing.py::TestOperator::test_split_anywhere",
    "test_distill.py::test_step_trains_the_students_and_nothing_else",
    "test_distill.py::test_terms_are_the_differences_of_two_models",
    "test_docs.py::test_python_of_a_page_runs[README.md]",
    "test_families.py::test_a_base_model_comes_back_as_it_was_read[bare]",
    "test_families.py::test_toy_generation_and_training",
    "test_families.py::test_toy_weights",
    "test_gated_delta_rule.py::TestGatedDeltaRule::test_lengths_equal_segment_ids",
    "test_gated_delta_rule.py::TestGatedDeltaRule::test_padding_is_a_no_op",
    "test_generation.py::test_a_row_does_not_depend_on_its_batch",
    "test_generation.py::test_all_kinds_equal_the_full_forward",
    "test_generation.py::test_halves_of_a_chunk_on_several_devices",
    "test_generation.py::test_num_iter_per_prompt",
    "test_generation.py::test_one_program_each_on_every_mesh",
    "test_generation.py::test_packed_models_share_programs",
    "test_generation.py::test_second_prompt_compiles_nothing",
    "test_gka.py::TestGKA::test_lengths_equal_segment_ids",
    "test_gka.py::TestGKA::test_padding_is_a_no_op",
    "test_gka.py::test_gradient_is_that_of_the_exact_solve",
    "test_gka.py::test_lambda_carries_gradient_into_the_initial_covariance",
    "test_gka.py::test_num_iter_per_row_at_run_time",
    "test_gka_mosaic.py::TestLaws::test_row_of_padding_keeps_the_state",
    "test_gka_mosaic.py::test_equals_float64[packed]",
    "test_gka_solver.py::test_gradient_is_that_of_the_exact_solve[False-chunked]",
    "test_gka_solver.py::test_steps_continue_a_prefill",
    "test_kinds.py::test_generation",
    "test_kinds.py::test_however_it_is_cut",
    "test_kinds.py::test_training",
    "test_laws.py::test_any_cut_gives_the_same[*]",
    "test_laws.py::test_any_cut_gives_the_same[BMF]",
    "test_laws.py::test_any_cut_gives_the_same[GDN]",
    "test_laws.py::test_any_cut_gives_the_same[GKA]",
    "test_laws.py::test_any_cut_gives_the_same[M2]",
    "test_laws.py::test_any_cut_gives_the_same[SWA]",
    "test_laws.py::test_any_cut_gives_the_same[all six]",
    "test_laws.py::test_decoding_continues_a_prefill[*]",
    "test_laws.py::test_decoding_continues_a_prefill[BMF]",
    "test_laws.py::test_decoding_continues_a_prefill[GDN]",
    "test_laws.py::test_decoding_continues_a_prefill[GKA]",
    "test_laws.py::test_decoding_continues_a_prefill[M2]",
    "test_laws.py::test_decoding_continues_a_prefill[SWA]",
    "test_laws.py::test_packed_is_separate[BMF]",
    "test_laws.py::test_padding_leaves_no_trace[*]",
    "test_laws.py::test_padding_leaves_no_trace[BMF]",
    "test_laws.py::test_padding_leaves_no_trace[GDN]",
    "test_laws.py::test_padding_leaves_no_trace[GKA]",
    "test_laws.py::test_padding_leaves_no_trace[M2]",
    "test_laws.py::test_padding_leaves_no_trace[SWA]",
    "test_loading.py::test_config_overrides",
    "test_loading.py::test_stored_dtypes_survive",
    "test_lora.py::test_a_mesh_makes_the_same_step",
    "test_lora.py::test_adapters_travel_alone",
    "test_lora.py::test_merged_is_unmerged_in_every_layer_kind",
    "test_lora.py::test_quantised_projections[nf4-uint4-0.1]",
    "test_model.py::test_every_mesh_gives_the_single_device_logits",
    "test_model.py::test_split_sequences[kinds0]",
    "test_model.py::test_the_same_random_model_on_every_mesh",
    "test_model_goldens.py::test_a_wrong_model_fails",
    "test_model_goldens.py::test_bfloat16[attn_hd64_bias]",
    "test_model_goldens.py::test_float32[attn_hd64_bias]",
    "test_model_goldens.py::test_float32[bmf_m2_untied]",
    "test_model_goldens.py::test_float32[gka]",
    "test_operators.py::test_backward_sums_only_what_is_shared[causal_conv1d kv heads",
    "test_operators.py::test_backward_sums_only_what_is_shared[causal_conv1d lengths",
    "test_operators.py::test_backward_sums_only_what_is_shared[decode_attention",
    "test_operators.py::test_backward_sums_only_what_is_shared[gated_delta_rule",
    "test_operators.py::test_backward_sums_only_what_is_shared[ssd",
    "test_operators.py::test_backward_sums_only_what_is_shared[two_window",
    "test_operators.py::test_keys_of_all_heads_are_split_like_queries[ssd]",
    "test_oracle.py::test_formulas[six other-cuts0]",
    "test_packaging.py::test_only_hmf_jax_is_importable[editable]",
    "test_runs.py::test_a_longer_run_goes_on",
    "test_slots.py::test_slots_change_nothing",
    "test_ssd.py::TestSSD::test_padding_is_a_no_op",
    "test_stage0.py::test_gates_start_from_o_and_v[rows]",
    "test_step.py::test_adamw_step",
    "test_step.py::test_chunked_loss_is_the_plain_loss",
    "test_step.py::test_cross_entropy_in_chunks[5]",
    "test_step.py::test_packed_is_separate",
    "test_step.py::test_remat_changes_nothing_but_memory",
    "test_train.py::test_forgetting_leaves_the_windows_and_nothing_else[BMF]",
    "test_train.py::test_stacking_parameters_changes_no_update",
    "test_train.py::test_states_start_with_a_long_memory[kinds1]",
    "test_trainer.py::test_the_loop_is_its_steps",
    "test_two_window_attention.py::test_packed_equals_separate",
)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    for item in items:
        _, _, name = item.nodeid.rpartition("/")
        if name.startswith(OVERLAPPING):
            item.add_marker(pytest.mark.slow)
    if jax.default_backend() != "gpu":
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def forget_programs(request: pytest.FixtureRequest) -> Iterator[None]:
    """One process cannot map the compiled programs of all slow tests at once."""
    yield
    if request.node.get_closest_marker("slow"):
        jax.clear_caches()
