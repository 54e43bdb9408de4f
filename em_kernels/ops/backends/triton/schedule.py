"""The order of the work in the fused kernel of the loss, and why no program in it waits for ever or reads too early.

A row is cut into parts. Each part is two tasks: its sums, and, once the sums of all parts of its row are known, its
gradient, which reads the part a second time. Programs draw tickets from a counter in memory, one each, and `task_of`
names the task of a ticket: sums run ahead of gradients by `lag` rows, and from there on the two alternate. Between its
two readings a row waits for `lag` rows, whatever the number of programs that run at once, so what the second-level
cache has to hold is `lag` rows, and what is under way.

A row has a counter of its own. What waits and what is waited for:

  1. A sums task stores its part's sums and then adds 1 to the row's counter with release semantics.
  2. A gradient task reads the row's counter with acquire semantics until it is the number of parts, and only then reads
     their sums. The acquiring read observes the last of a sequence of read-modify-writes, which continues the release
     sequence of every one before it, so that it synchronises with all of them. A barrier before the release and one
     after the acquire extend the order from one thread to its program. The acquire also drops what the multiprocessor's
     own cache holds: an earlier task may have left there what lies beside the sums that it read.
  3. Where the divisor is the sum of the weights, the first ticket is a task of its own that makes it. The sum is one
     word and its own flag, 0 until it is there: a gradient task reads it, atomically, until it is not 0, and needs no
     order with anything else in memory.
  4. In place, a gradient is written where its own part's logits were, which nobody reads but this part's two tasks, and
     the sums task has read them before its release.

No program waits for one that cannot run. Only gradient tasks wait, and only for sums tasks of the same row and for the
first ticket, all of which are earlier tickets. A ticket is drawn by a program that runs, and a program that runs is not
suspended for others. Sums tasks and the first ticket wait for nothing, so they end, and with them every wait. It does
not matter how many programs fit the device: with one at a time, tickets are done in order, and nothing waits at all.

The order of the additions is no part of a result: a gradient task unites the parts' sums in the order of the parts, and
the losses of the rows are added in the order of the rows by the program that is the last to have stored one.
"""

import triton
import triton.language as tl  # noqa: F401  Triton's interpreter asks for it in every file of kernels.


@triton.jit
def task_of(ticket, rows, parts, lag):
    """(row, part, whether the task is the part's gradient) of a ticket in [0, 2 rows parts); lag is in [1, rows].

    Tickets are 32-bit.
    """
    ahead = lag * parts
    alternating = ticket - ahead
    ahead_only = alternating < 0
    gradients_only = alternating >= 2 * (rows - lag) * parts
    is_gradient = gradients_only or (not ahead_only and alternating % 2 == 1)
    index = alternating // 2
    if ahead_only:
        index = ticket
    elif gradients_only:
        index = ticket - rows * parts
    elif not is_gradient:
        index = ahead + alternating // 2
    return index // parts, index % parts, is_gradient
