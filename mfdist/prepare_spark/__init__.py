"""``prepare`` on a Spark cluster: the same dataset, byte for byte, whatever the number of executors.

Enters: sources and the flags of ``prepare``, as in the room ``prepare``. Leaves: the dataset directory.
May import: ``prepare``, ``data``, ``kernels`` and the top level.

The room has no rule of its own about ratings. Reading, checks, hashes, merging, the split, numbering and the files of
lanes are functions of ``prepare``, called inside ``mapInArrow``; Spark moves their results and repeats lost tasks.

What crosses a border is a *message* (``messages``): (target partition, kind, place, number, bytes), its bytes some
megabytes of columns in Arrow's form. So Spark handles a few large values, never a rating. P is a power of two; part p
of the users are those whose hash begins with the bits of p; the items have Q such parts.

    copy     only for tables that Spark alone can read: their columns to Parquet files (``lake_tables``)
    cut      a task for each large file: its fingerprint, where its pieces begin, the unit of its times   -> driver
    read     pieces -> blocks of checked rows (``read_pass.keep``)
             -> rows and user ids to part p, item ids to P + q, refused rows and counts to the last partition
    gather   part p: all rows sorted and merged, ids once each; kept on the executors' disks
             -> driver: counts of every part, the hashes of all items
    count    only for minimum counts and time splits: passes over the parts, sums by item or by bin of time -> driver
    number   part p, given how many users and rows come before it: split, user numbers, cut into lanes
             -> lane l, users.parquet, rejected.parquet, and counts of items to their part q
    write    one task a lane, one for users.parquet, one for rejected.parquet, one for each part of the items
             -> driver: names and checksums of the files that the task wrote, and its counts
    commit   the driver moves exactly these files to their names, writes items.parquet, the report, the manifest last

A dense number is the number of users in the parts before plus the place by hash within the part: no global sort.

**Why a repeated task changes nothing.** Every output is a pure function of the task's input as a set: parts are sorted
by (hash, ..., rating), lanes by (part, number), and the key that a message travels by is computed from ids alone; none
is random or the place of a row in a partition. A task writes only below a folder of its attempt's name, and says so in
the row that it returns; of several attempts (a lost executor, speculation) the driver gets one row and moves that
one's files. Counts are added up from such rows, never from accumulators, which count a repeated task twice. What other
attempts have written is removed with the folder ``.scratch``. Until the manifest is written there is no dataset.

An error of the user's found in a task (a damaged file, too long a lane) travels as a message, so that Spark does not
repeat what cannot help; the driver raises the first in the order of the sources.
"""
