// Runs an exported policy at a fixed rate, as a robot's controller would, and says how long its answers took.
//
//   controller GRAPH.pt GOLDEN.pt [--rate 20] [--ticks 1000] [--warm-up 50] [--threads 1] [--tolerance 1e-4]
//
// GRAPH.pt is policy.pt or policy_step.pt of an artefact and GOLDEN.pt the golden_*.pt beside it: a TorchScript module
// whose forward() gives, all of batch 1,
//   0  inputs    list over ticks of the graph's inputs in order, without its cache
//   1  expected  list over ticks of the answers of the model that was exported, in order, without the next cache
//   2  starts    list over ticks: whether an episode begins, with an empty cache
//   3  cache     the empty cache; no tensors where the graph has none
// On a robot `inputs` comes from its sensors. Nothing is clamped here: the limits of the robot lie in the graph, which
// says in its second output which of them acted. The controller executes row 0 of `actions` now and one row a period.
//
// Exit status: 0, 1 if an answer is not finite or farther from what was expected than the tolerance, 2 on wrong use.

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <exception>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using Tensors = std::vector<torch::Tensor>;

struct Golden {
  std::vector<Tensors> inputs;
  std::vector<Tensors> expected;
  std::vector<bool> starts;
  Tensors cache;
};

std::vector<Tensors> lists(const c10::IValue& value) {
  std::vector<Tensors> rows;
  for (const c10::IValue& row : value.toListRef()) rows.push_back(row.toTensorVector());
  return rows;
}

Golden load_golden(const std::string& file) {
  torch::jit::Module module = torch::jit::load(file);
  const auto parts = module.forward({}).toTupleRef().elements().vec();
  Golden golden{lists(parts.at(0)), lists(parts.at(1)), {}, parts.at(3).toTensorVector()};
  for (bool start : parts.at(2).toBoolList()) golden.starts.push_back(start);
  if (golden.inputs.empty() || golden.expected.size() != golden.inputs.size() ||
      golden.starts.size() != golden.inputs.size() || !golden.starts.front()) {
    throw std::runtime_error(file + ": expected as many inputs as answers, and an episode that begins at the first");
  }
  return golden;
}

// The policy with the cache that it hands from one tick to the next.
class Policy {
 public:
  Policy(const std::string& file, Tensors empty) : module_(torch::jit::load(file)), empty_(std::move(empty)) {
    module_.eval();
    reset();
  }

  void reset() { cache_ = empty_; }

  // The answers, without the next cache.
  Tensors operator()(const Tensors& inputs) {
    std::vector<c10::IValue> feed(inputs.begin(), inputs.end());
    feed.insert(feed.end(), cache_.begin(), cache_.end());
    const auto answer = module_.forward(std::move(feed)).toTupleRef().elements().vec();
    if (answer.size() < cache_.size()) throw std::runtime_error("the graph answers less than its cache");
    Tensors outputs;
    for (const c10::IValue& value : answer) outputs.push_back(value.toTensor());
    const auto kept = outputs.end() - static_cast<std::ptrdiff_t>(cache_.size());
    cache_.assign(kept, outputs.end());
    outputs.erase(kept, outputs.end());
    return outputs;
  }

 private:
  torch::jit::Module module_;
  Tensors empty_;
  Tensors cache_;
};

// The largest difference of the answers that are numbers; flags are compared where the artefact is built. As there,
// actions are compared as they are and other answers over their size where that is above 1.
double difference(const Tensors& answer, const Tensors& expected) {
  if (answer.size() < expected.size()) throw std::runtime_error("the graph answers less than is expected of it");
  double largest = 0.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    if (!expected[i].is_floating_point()) continue;
    const torch::Tensor right = expected[i].to(torch::kFloat64);
    const torch::Tensor given = answer[i].to(torch::kFloat64);
    if (given.sizes() != right.sizes()) throw std::runtime_error("an answer has another shape than is expected");
    if (!torch::isfinite(given).all().item<bool>()) return INFINITY;
    const double size = i == 0 ? 1.0 : std::max(1.0, right.abs().max().item<double>());
    largest = std::max(largest, (given - right).abs().max().item<double>() / size);
  }
  return largest;
}

// Linear between the two nearest, as numpy does.
double percentile(const std::vector<double>& sorted, double share) {
  const double place = share * static_cast<double>(sorted.size() - 1);
  const size_t below = static_cast<size_t>(place);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - static_cast<double>(below)) * (sorted[above] - sorted[below]);
}

int run(const std::string& graph, const std::string& golden_file, const std::map<std::string, double>& settings) {
  torch::InferenceMode inference;
  at::set_num_threads(static_cast<int>(settings.at("--threads")));
  const Golden golden = load_golden(golden_file);
  Policy policy(graph, golden.cache);
  const size_t examples = golden.inputs.size();
  const size_t warm_up = static_cast<size_t>(settings.at("--warm-up"));
  // Every example is compared, however few ticks are measured.
  const size_t ticks = std::max(static_cast<size_t>(settings.at("--ticks")), examples);
  const std::chrono::duration<double> seconds(1.0 / settings.at("--rate"));
  const auto period = std::chrono::duration_cast<Clock::duration>(seconds);
  const double period_ms = 1e3 * seconds.count();

  std::vector<double> latencies;
  latencies.reserve(ticks);
  size_t late = 0;
  double largest = 0.0;
  auto due = Clock::now();
  for (size_t tick = 0; tick < warm_up + ticks; ++tick) {
    std::this_thread::sleep_until(due);
    const size_t example = tick % examples;
    if (golden.starts[example]) policy.reset();
    const auto begun = Clock::now();
    const Tensors answer = policy(golden.inputs[example]);
    const double milliseconds = std::chrono::duration<double, std::milli>(Clock::now() - begun).count();
    if (tick >= warm_up) {
      latencies.push_back(milliseconds);
      late += milliseconds > period_ms;
    }
    largest = std::max(largest, difference(answer, golden.expected[example]));
    // A late tick is not caught up with: the next is due a whole period after now at the latest.
    due = std::max(due + period, Clock::now());
  }
  std::sort(latencies.begin(), latencies.end());
  std::printf("ticks %zu at %g Hz, late %zu\n", ticks, settings.at("--rate"), late);
  std::printf("latency ms: p50 %.3f p99 %.3f p99.9 %.3f max %.3f\n", percentile(latencies, 0.5),
              percentile(latencies, 0.99), percentile(latencies, 0.999), latencies.back());
  std::printf("largest difference %.3g\n", largest);
  if (!(largest <= settings.at("--tolerance"))) {
    std::fprintf(stderr, "controller: at most %g is allowed\n", settings.at("--tolerance"));
    return 1;
  }
  return 0;
}

}  // namespace

int main(int count, char** words) {
  std::map<std::string, double> settings{
      {"--rate", 20}, {"--ticks", 1000}, {"--warm-up", 50}, {"--threads", 1}, {"--tolerance", 1e-4}};
  std::vector<std::string> files;
  try {
    for (int i = 1; i < count; ++i) {
      const std::string word = words[i];
      if (word.rfind("--", 0) != 0) {
        files.push_back(word);
      } else if (settings.count(word) == 0 || i + 1 == count) {
        throw std::invalid_argument(word + ": expected --rate, --ticks, --warm-up, --threads or --tolerance and a number");
      } else {
        const double value = std::stod(words[++i]);
        if (!(value > 0 || (word == "--warm-up" && value == 0)) || !std::isfinite(value)) {
          throw std::invalid_argument(word + ": got " + words[i] + ", expected a number above 0");
        }
        settings[word] = value;
      }
    }
    if (files.size() != 2) throw std::invalid_argument("expected GRAPH.pt GOLDEN.pt");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "controller: %s\n", error.what());
    return 2;
  }
  try {
    return run(files[0], files[1], settings);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "controller: %s\n", error.what());
    return 1;
  }
}
