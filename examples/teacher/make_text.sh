#!/bin/sh
# Makes the teacher's text: one file per page of CMake's manual, in OUT/manual and OUT/manual_held_out, and, if a
# folder of novels (*.txt) is given, OUT/novels, OUT/novels_held_out and OUT/novels_sample (training novels, for the
# tokenizer). What is held out depends on the page title (about 5 %) or the file name (about 3 %) alone.
#   usage: make_text.sh OUT [NOVELS]        CMAKE=/path/to/cmake to choose one (3.20 or newer)
set -eu
[ $# -ge 1 ] || { echo "usage: $0 OUT [NOVELS]" >&2; exit 2; }
out=$1
novels=${2:-}
cmake=${CMAKE:-cmake}
[ ! -e "$out" ] || { echo "$0: $out exists already" >&2; exit 2; }
work=$out.partial
rm -rf "$work"
mkdir -p "$work/manual" "$work/manual_held_out"
export LC_ALL=C

# A page is a title underlined with dashes of at least its length, up to the next title of that or a higher level.
"$cmake" --help-full | awk -v out="$work" '
  function hash(text,   i, h) {
    h = 7
    for (i = 1; i <= length(text); ++i) h = (h * 31 + code[substr(text, i, 1)]) % 65521
    return h
  }
  function close_page(   name, folder) {
    if (size > 0) {
      folder = hash(title) % 20 == 0 ? "/manual_held_out/" : "/manual/"
      name = title
      gsub(/[^A-Za-z0-9_.-]+/, "_", name)
      file = sprintf("%s%s%04d_%s.txt", out, folder, ++pages, substr(name, 1, 60))
      printf "%s\n", page > file
      close(file)
    }
    page = ""
    size = 0
  }
  function add(line) {
    if (line == "" && size == 0) return
    if (line == "") { ++blank; return }
    while (blank > 0) { page = page "\n"; --blank }
    page = page (size > 0 ? "\n" : "") line
    size += length(line)
  }
  BEGIN { for (i = 1; i < 256; ++i) code[sprintf("%c", i)] = i; title = "CMake" }
  {
    underline = length($0) >= 3 && length($0) >= length(before) && before != "" && before !~ /^ /
    if (have && underline && $0 ~ /^-+$/) {
      close_page(); blank = 0; title = before
      add(before); add($0); have = 0; before = ""
      next
    }
    if (have && underline && ($0 ~ /^=+$/ || $0 ~ /^\*+$/ || $0 ~ /^#+$/)) {
      close_page(); blank = 0; title = before
      add(before); add($0); have = 0; before = ""
      next
    }
    if (have) add(before)
    before = $0; have = 1
  }
  END { if (have) add(before); close_page() }
'

if [ -n "$novels" ]; then
  mkdir -p "$work/novels" "$work/novels_held_out" "$work/novels_sample"
  for file in "$novels"/*.txt; do
    name=$(basename "$file")
    sum=$(printf '%s' "$name" | cksum | cut -d' ' -f1)
    if [ $((sum % 29)) -eq 0 ]; then cp "$file" "$work/novels_held_out/"; else cp "$file" "$work/novels/"; fi
    if [ $((sum % 29)) -ne 0 ] && [ $((sum % 16)) -eq 1 ]; then cp "$file" "$work/novels_sample/"; fi
  done
fi
mv "$work" "$out"
