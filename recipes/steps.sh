# No recipe, but what they share and source: where data and runs lie, what comes before, and the label-efficient sets.
DATA=${DATA:-data} # the data sets, each under its name (docs/reproducing.md)
RUNS=${RUNS:-runs} # the runs, each under the name of its recipe

# DRY_RUN=1 prints the commands, from the teacher to the number, and runs none.
if [[ -n ${DRY_RUN:-} ]]; then
  dreamteacher() { echo "dreamteacher$(printf ' %q' "$@")"; }
fi

# With --dry-run among a recipe's settings, what comes before must not run either.
case " $* " in *" --dry-run "*) ONLY_CHECK=--dry-run ;; *) ONLY_CHECK= ;; esac

# first NAME [SET]: runs the recipe that comes before, unless its result is there.
first() {
  local run=$RUNS/$1${2:+-$2}
  if [[ -z ${DRY_RUN:-} && (-e $run/backbone.safetensors || -e $run/interpreter.json || -e $run/teacher.json) ]]; then
    return
  fi
  bash "$(dirname "${BASH_SOURCE[0]}")/$1.sh" "${@:2}" $ONLY_CHECK
}

# label_efficient SET: its images, its labelled images and how many there are, its teacher.
label_efficient() {
  SET=${1:-}
  case $SET in
    bedroom) IMAGES=lsun:$DATA/lsun/bedroom LABELLED=bedroom_28:$DATA/bedroom_28 COUNT=40 TEACHER=adm-lsun-bedroom ;;
    ffhq) IMAGES=ffhq:$DATA/ffhq LABELLED=ffhq_34:$DATA/ffhq_34 COUNT=20 TEACHER=adm-ffhq ;;
    cat) IMAGES=lsun:$DATA/lsun/cat LABELLED=cat_15:$DATA/cat_15 COUNT=30 TEACHER=adm-lsun-cat ;;
    horse) IMAGES=lsun:$DATA/lsun/horse LABELLED=horse_21:$DATA/horse_21 COUNT=30 TEACHER=adm-lsun-horse ;;
    *)
      echo "error: '$SET' is no label-efficient set." >&2
      echo "Give bedroom, ffhq, cat or horse, and settings after it: bash recipes/${0##*/} cat" >&2
      exit 2
      ;;
  esac
}

# The name of the recipe that runs, under which its run lies.
NAME=$(basename "$0" .sh)

# evaluate_after PRETRAINED SETTING ...: evaluates the backbone of a recipe, which comes first.
evaluate_after() {
  first "$1"
  dreamteacher evaluate --init "$RUNS/$1" --out "$RUNS/$NAME" "${@:2}"
}

# bdd100k_instances PRETRAINED [SETTING ...]: the same, on BDD100K's instances.
bdd100k_instances() {
  evaluate_after "$1" --preset bdd100k-instance --student resnet50 --images "bdd100k:$DATA/bdd100k" --workers 16 "${@:2}"
}

# pretrain_with_labels STUDENT KIND [SETTING ...]: label or mixed distillation on the set's images.
pretrain_with_labels() {
  first interpreter-label-efficient "$SET"
  dreamteacher get-teacher "$TEACHER" $ONLY_CHECK
  dreamteacher pretrain --images "$IMAGES" --out "$RUNS/$NAME-$SET" --teacher "$TEACHER" --student "$1" \
    --distill "$2" --interpreter "$RUNS/interpreter-label-efficient-$SET" --t 50 --accumulate 2 --workers 16 "${@:3}"
}

# few_masks STUDENT KIND [SETTING ...]: segmentation with the set's masks, from the pretraining of the same name. Label
# and mixed distillation hand their neck on, too.
few_masks() {
  local neck=--neck
  if [[ $2 == feature ]]; then neck=; fi
  first "pretrain-$NAME" "$SET"
  dreamteacher evaluate --preset label-efficient --student "$1" --init "$RUNS/pretrain-$NAME-$SET" \
    --images "$LABELLED" --mask-counts "$COUNT" $neck --workers 16 --out "$RUNS/$NAME-$SET" "${@:3}"
}
