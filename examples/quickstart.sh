#!/usr/bin/env bash
# The main job from nothing: installs what is missing, builds into build/, then prunes, distills, quantizes and exports
# the tiny teacher of this repository, prints how close the result is, and lets it write a paragraph.
# Finished stages are skipped when run again; remove out/ to start over. Settings: see examples/build.sh.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${PARE_BUILD:-$root/build}
cd "$root"
bash examples/build.sh pare
mkdir -p out
if [ ! -d out/quickstart-text ]; then
  echo "Text: the pages of CMake's manual (cmake --help-full)."
  sh examples/teacher/make_text.sh out/quickstart-text
fi
echo "Compressing examples/teacher by examples/quickstart.yaml"
"$build/pare" compress examples/quickstart.yaml
echo
echo "The compact file continues a manual page:"
"$build/pare" run out/quickstart/model.pare -p "add_library
-----------

Add a library to the project using the specified source files." -n 120 --temp 0.7 --top-p 0.9 --seed 1
echo
echo "Report: out/quickstart/report.json   File: out/quickstart/model.pare   Folder for transformers: out/quickstart/model"
