"""What a run is promised to survive, and the tests of each promise; docs/reliability.md has the same table."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Promise:
    """What a fault does to a run.

    Attributes:
      area: heading that it stands under.
      fault: what happens.
      expected: what the run does then.
      tests: "FOLDER/FILE::FUNCTION" below tests/, without ".py" and "test_".
    """

    area: str
    fault: str
    expected: str
    tests: tuple[str, ...]


PROMISES = (
    Promise(
        "kills",
        "SIGKILL at any moment, a checkpoint half written, an evaluation or a compilation among them",
        "the same command ends with the same bits: state, metrics and results",
        ("torture/soak::three_kills", "train/trainer::resume_is_bit_exact"),
    ),
    Promise(
        "kills",
        "a process that reads data is killed",
        "a run of one process saves the last step, several end; one sentence, most often too little memory",
        ("processes/interrupt::a_killed_worker_is_one_sentence",),
    ),
    Promise(
        "kills",
        "the run is killed and has processes that read",
        "they end with it",
        ("integration/workers::workers_end_with_the_run_that_is_killed",),
    ),
    Promise(
        "signals",
        "SIGTERM or Ctrl-C in a step",
        "that step is saved, status 75; the same command resumes",
        (
            "train/trainer::sigterm_saves_and_the_same_command_goes_on",
            "integration/workers::a_signal_to_the_group_saves_the_last_step",
        ),
    ),
    Promise(
        "signals",
        "a signal in an evaluation",
        "the evaluation is abandoned and the last step saved; the run repeats the evaluation when it resumes",
        (
            "processes/interrupt::a_signal_in_an_evaluation_saves_the_last_step_and_the_evaluation_is_made_later",
            "torture/faulty_processes::a_signal_in_an_evaluation_leaves_it_in_both",
        ),
    ),
    Promise(
        "signals",
        "a signal while the run waits for data",
        "the last step is saved at once",
        ("train/loop::a_signal_saves_the_last_step_while_data_do_not_come",),
    ),
    Promise(
        "signals",
        "a signal during compilation, or before anything is trained",
        "status 75, nothing half written",
        (
            "processes/interrupt::a_signal_ends_a_compilation",
            "core/errors::a_signal_while_xla_compiles_ends_a_run_with_its_status",
            "processes/interrupt::signals_outside_the_loop_end_the_process_at_once",
        ),
    ),
    Promise(
        "signals",
        "a signal at any second of the start, with an empty compilation cache",
        "status 75; before the run handles signals 143, of Ctrl-C 130",
        (
            "torture/signals::a_signal_at_any_second_of_the_start_ends_a_run_as_documented",
            "core/errors::ctrl_c_while_a_command_imports_is_one_sentence",
            "core/errors::ctrl_c_in_a_callback_that_drops_exceptions_ends_a_command",
        ),
    ),
    Promise(
        "signals",
        "a signal in a step that takes minutes, or while an evaluation compiles",
        "the step ends and is saved, however long it takes",
        (
            "integration/slow_steps::a_signal_in_a_long_step_saves",
            "processes/interrupt::a_signal_in_an_evaluation_saves_the_last_step_and_the_evaluation_is_made_later",
        ),
    ),
    Promise(
        "signals",
        "a signal in the report",
        "the report is abandoned, status 75; xclip-jax report makes it",
        (
            "train/callbacks::a_signal_in_the_report_leaves_it_and_ends_the_trackers",
            "torture/faulty_processes::a_signal_in_the_report_leaves_it_in_both",
        ),
    ),
    Promise(
        "signals",
        "a second signal",
        "the process ends at once",
        ("processes/interrupt::the_second_signal_acts_also_where_the_first_is_ignored_by_inheritance",),
    ),
    Promise(
        "signals",
        "a signal to one of several processes",
        "all save the same step",
        (
            "torture/faulty_processes::a_signal_to_one_process_saves_in_both",
            "torture/faulty_processes::a_signal_before_the_first_step_stops_both_after_it",
        ),
    ),
    Promise(
        "stalls",
        "a step, an evaluation, a save or the data hang",
        "the phase is reported, the stacks of all threads are written, status 79",
        (
            "processes/watchdog::the_watchdog_names_the_phase_and_ends_the_process",
            "processes/watchdog::progress_keeps_the_watchdog_quiet",
        ),
    ),
    Promise(
        "stalls",
        "a read never ends, as on a network disk that is gone, in the run or in a process that reads for it",
        "a bad sample after 300 s; if none is read, the source is named, then log.stall_limit, status 79",
        (
            "data/base::a_sample_that_is_never_read_is_a_bad_one",
            "integration/workers::a_read_that_never_ends_in_a_worker_ends_the_run",
        ),
    ),
    Promise(
        "stalls",
        "a named pipe, a device, a link to one or a giant file among images or captions",
        "a bad sample with its reason",
        (
            "data/readers/folder::what_a_folder_cannot_read_is_a_bad_sample",
            "data/readers/table::rows_whose_image_cannot_be_read_are_bad_samples",
            "data/labelled::a_pipe_and_a_giant_file_are_bad_samples",
            "commands/inputs::a_pipe_in_place_of_a_caption_is_none",
        ),
    ),
    Promise(
        "processes",
        "one of several processes fails",
        "all end within seconds and report which one failed and why; steps since the last checkpoint are repeated",
        (
            "torture/faulty_processes::an_error_in_one_process_ends_both",
            "torture/faulty_processes::an_error_in_the_report_of_one_process_ends_both",
        ),
    ),
    Promise(
        "processes",
        "process 0 takes long for its report or for the end of its trackers",
        "the others wait for it",
        (
            "processes/peers::the_others_wait_until_process_0_is_finished",
            "torture/faulty_processes::a_report_that_takes_longer_than_the_barrier_at_the_end_is_awaited",
        ),
    ),
    Promise(
        "processes",
        "one of several processes is killed, or hangs for `log.stall_limit`",
        "the others end within 30 s; one that hangs is named, and JAX reports one that is killed",
        (
            "torture/faulty_processes::the_end_of_a_killed_process_ends_the_other",
            "torture/faulty_processes::the_end_of_process_0_ends_the_other",
            "torture/faulty_processes::a_process_that_hangs_ends_both_and_is_named",
        ),
    ),
    Promise(
        "processes",
        "processes with another config, code, package, data, evaluation set or newest checkpoint",
        "they refuse to start and report the difference",
        (
            "torture/faulty_processes::processes_with_different_configs_refuse_to_start",
            "torture/faulty_processes::processes_with_different_data_refuse_to_start",
            "integration/same_data::hosts_compare_their_evaluation_sets",
            "integration/same_data::hosts_compare_their_newest_checkpoints",
        ),
    ),
    Promise(
        "checkpoints",
        "a bit flips, or a file is cut, emptied or missing, in a checkpoint",
        "the file is named or the fault is harmless; the newest intact one is used, and the damaged one moved aside",
        (
            "train/checkpoint_files::every_damaged_file_is_named_or_harmless",
            "train/checkpoint::the_newest_whole_checkpoint_is_used_and_the_others_move_aside",
            "train/training_folder::a_run_goes_back_to_its_newest_whole_checkpoint_and_ends_as_it_would_have",
            "processes/runtime::processes_agree_that_a_checkpoint_is_damaged",
        ),
    ),
    Promise(
        "checkpoints",
        "a storage fails for a moment while a checkpoint is read whose files agree with their digest",
        "the start ends with that error; the checkpoint stays the newest",
        (
            "train/checkpoint::a_storage_that_fails_for_a_moment_is_not_damage",
            "train/checkpoint::an_item_that_a_storage_does_not_show_for_a_moment_is_not_damage",
        ),
    ),
    Promise(
        "checkpoints",
        "a command that only reads finds a damaged checkpoint",
        "it changes nothing, and names the newest intact one",
        ("train/checkpoint::readers_move_nothing",),
    ),
    Promise(
        "checkpoints",
        "the run continues with other devices, meshes, hosts, workers or threads",
        "the same values are restored, and the same samples follow",
        (
            "train/checkpoint::a_checkpoint_comes_back_on_other_meshes",
            "processes/runtime::a_checkpoint_comes_back_in_each_process",
            "data/readers/tar::resumed_on_other_hosts_as_if_never_stopped",
            "data/loader::workers_read_the_same",
        ),
    ),
    Promise(
        "disks",
        "the disk is full, read-only, too small from the start, or its folder vanishes",
        "one sentence with the folder and the bytes that are needed; earlier checkpoints stay intact",
        (
            "train/checkpoint::a_full_disk",
            "train/checkpoint::a_read_only_disk",
            "train/checkpoint::a_folder_that_vanished_is_not_made_again",
            "train/checkpoint::a_save_that_fails_is_reported_at_once_and_costs_no_other",
            "train/checkpoint::an_old_checkpoint_that_cannot_be_deleted_is_a_warning",
            "train/training_folder::a_disk_that_is_too_small_is_an_error_before_anything_is_written",
            "train/training_folder::folders_that_cannot_be_written",
        ),
    ),
    Promise(
        "disks",
        "two runs are started on one folder",
        "the second is refused by a lock that a kill does not leave behind",
        ("train/training_folder::two_runs_cannot_share_a_folder",),
    ),
    Promise(
        "disks",
        "a run's folder is moved, copied or given by another path, with its data and tokenizer",
        "the same command continues there",
        ("train/training_folder::a_run_may_be_moved_with_its_data_and_its_tokenizer",),
    ),
    Promise(
        "disks",
        "checkpoints are lost",
        "the run does not silently start over: the error names the remedy",
        (
            "integration/damaged_files::lost_checkpoints_are_not_trained_over",
            "integration/damaged_files::a_run_that_starts_again_for_want_of_a_checkpoint_says_so",
        ),
    ),
    Promise(
        "disks",
        "a small file of the run's folder, or the index of a tar, is damaged or cut by a kill or a power failure",
        "the file and the remedy are named, damaged lines are left out, an index is rebuilt",
        (
            "integration/damaged_files::a_damaged_file_is_named",
            "integration/damaged_files::lines_without_what_they_should_have_are_left_out",
            "integration/damaged_files::the_copy_of_the_tokenizer_is_whole_or_missing",
            "core/json_lines::json_lines_drop_what_is_damaged",
            "core/json_lines::json_lines_survive_a_kill_while_they_are_rewritten",
            "data/readers/tar_index::a_stored_index_that_is_damaged_is_made_again",
        ),
    ),
    Promise(
        "values",
        "a loss or gradient is not finite",
        "the step changes only the step count; later steps are those of a run without it; it is counted and listed",
        (
            "train/recovery::a_bad_batch_changes_nothing_but_the_step",
            "train/recovery::a_run_goes_on_without_the_bad_steps",
            "train/recovery::updates_are_finite_within_the_bounds_of_the_optimizer",
        ),
    ),
    Promise(
        "values",
        "too many such steps in a row",
        "the run stops and names the last checkpoint, or returns to it and skips the bad samples, as configured",
        (
            "train/recovery::too_many_in_a_row_stop_the_run",
            "train/recovery::a_rewind_undoes_the_last_steps_and_goes_on_behind_the_bad_ones",
            "train/recovery::a_run_killed_near_a_rewind_resumes_bit_exactly",
            "train/recovery::a_rewind_that_did_not_help_is_the_last",
        ),
    ),
    Promise(
        "data",
        "a sample cannot be read, for any reason",
        "another one takes its place; it is counted by reason and listed, and too many stop the run",
        (
            "data/base::any_exception_of_a_sample_makes_it_a_bad_one",
            "data/readers/tar::every_case_is_read_or_has_its_reason",
            "data/readers/tar::too_many_bad_samples_stop_the_run",
            "data/ledger::a_failure_after_long_good_data_is_noticed",
        ),
    ),
    Promise(
        "data",
        "too many samples are bad, data cannot be read at all, or an evaluation during training fails",
        "the last step is saved: by all processes if all count too many, otherwise only in a run of one process",
        (
            "train/loop::too_many_bad_samples_do_not_cost_the_steps_before",
            "train/loop::data_that_fail_do_not_cost_the_steps_before",
            "processes/interrupt::an_evaluation_that_fails_does_not_cost_the_steps_before",
            "torture/faulty_processes::too_many_bad_samples_save_in_both",
        ),
    ),
    Promise(
        "data",
        "an unpaired quote in a table",
        "with tabs it is a letter; with commas no row is lost silently",
        (
            "data/readers/table::quotes_mean_nothing_between_tabs",
            "data/readers/table::a_quote_without_a_partner_between_commas_swallows_no_rows",
        ),
    ),
    Promise(
        "data",
        "deeply nested JSON, half a surrogate pair, a path with a zero byte or of an unknown store, a cut parquet",
        "a bad sample if it is in one row, one sentence for a file",
        (
            "data/readers/tar::json_that_is_nested_or_holds_half_a_letter",
            "data/tokenizer::file_and_half_a_surrogate_pair",
            "data/readers/table::rows_whose_image_cannot_be_read_are_bad_samples",
            "data/readers/table::damaged_parquet_is_a_sentence",
            "core/storage::index_of_weights",
        ),
    ),
    Promise(
        "data",
        "data change between two starts; a tar is replaced, deleted, truncated or overwritten during a run",
        "the run does not resume and names the source; an open tar is still read, damaged samples have reasons",
        (
            "train/training_folder::changed_data_is_refused",
            "data/readers/folder::card_of_a_folder",
            "data/readers/table::card_of_tables_changes_with_their_content_alone",
            "data/readers/tar::a_tar_that_is_replaced_while_it_is_read_is_read_on",
            "data/readers/tar::a_tar_that_shrinks_while_it_is_read",
            "data/readers/tar::a_tar_that_is_overwritten_while_it_is_read_gives_reasons",
            "core/storage::a_file_that_a_server_forgot_is_opened_again",
        ),
    ),
    Promise(
        "data",
        "an image of an evaluation set cannot be read, or a set fails",
        "it counts as wrong; the other sets are evaluated; all sets are opened before the first step, and one "
        "whose images cannot be read for a while is left out with a warning",
        (
            "train/loop::all_sets_are_opened_before_the_first_step",
            "evaluators/registry::an_unreadable_image_counts_as_wrong_and_changes_no_other",
            "processes/runtime::every_process_knows_what_one_could_not_read",
            "train/loop::a_set_that_fails_at_the_end_does_not_cost_the_others",
            "train/loop::images_that_cannot_be_read_for_a_while_do_not_end_a_run",
        ),
    ),
    Promise(
        "hostile input",
        "any bytes in place of tars, indexes, images, captions, tokenizers, configs, weights or tables",
        "read or refused in one sentence, in bounded time and memory",
        ("torture/fuzz::every_reader_reads_or_refuses_what_is_hostile", "torture/fuzz::inputs_that_failed_before"),
    ),
    Promise(
        "hostile input",
        "headers of tars with signed or giant sizes, names with line breaks",
        "indexing neither hangs nor fails; damaged samples have their reason",
        (
            "data/readers/tar_index::a_header_with_an_odd_size_neither_hangs_the_index_nor_ends_it",
            "data/readers/tar_index::a_long_number_in_an_extended_header",
            "data/readers/tar_index::names_with_line_breaks",
        ),
    ),
    Promise(
        "hostile input",
        "large images and long captions",
        "memory and time are bounded",
        (
            "data/transforms::bounds_hold_before_anything_is_decoded",
            "data/tokenizer::giant_texts_take_bounded_time",
        ),
    ),
    Promise(
        "hostile input",
        "names with .. or /, links, devices; code in pickles; images that start a program; HTML in captions and names",
        "nothing is executed or written outside its folder; everything is escaped",
        (
            "data/readers/tar::names_that_lead_elsewhere_are_names_alone",
            "interop/tensor_files::a_pickle_that_asks_for_anything_else_is_refused",
            "data/transforms::formats_that_start_a_program_are_no_images",
            "commands/report::the_page_of_a_run_needs_nothing_else_and_escapes_everything",
        ),
    ),
)


def table(promises: Sequence[Promise]) -> list[str]:
    """Return the promises as Markdown, a table for each area."""
    lines: list[str] = []
    for area in dict.fromkeys(promise.area for promise in promises):
        lines += [f"### {area.capitalize()}", "", "| what happens | what the run does | tests |", "|---|---|---|"]
        for p in promises:
            if p.area == area:
                names = "<br>".join(f"`{test.replace('::', '::test_', 1)}`" for test in p.tests)
                lines.append(f"| {p.fault} | {p.expected} | {names} |")
        lines.append("")
    return lines
