# A line for each kernel and architecture of `ptxas -v`; fails where one spills.
/Compiling entry function/ { split($0, quoted, "'"); kernel = quoted[2]; arch = quoted[4] }
/bytes spill stores/ { spilled = $5 + $9 }
/Used [0-9]+ registers/ {
  registers = shared = 0
  for (i = 2; i <= NF; ++i) {
    if ($i ~ /^registers/) registers = $(i - 1)
    if ($i ~ /^smem/) shared = $(i - 2)
  }
  printf "  %-8s %3d registers %5d B shared %3d B spilled  %s\n", arch, registers, shared, spilled, kernel
  if (spilled > 0) bad = 1
}
END { exit bad }
